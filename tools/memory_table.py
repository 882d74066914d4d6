"""Print what each preset of `recipes.align_qwen3` needs on the Mac that it is for, as a Markdown table, in GiB.

    python -m tools.memory_table

Nothing is trained or downloaded: the plan of `mlxmm.modules.memory_plan` is computed from the real shapes
(tools/make_real_layouts.py), with the dtypes that Metal has: a bfloat16 language model, a float32 tower.
"""

import os
import re
import tempfile
from pathlib import Path

import attrs

from mlxmm.compute.memory import GIB, KEPT_SHARE
from mlxmm.modules.memory_plan import MemoryPlan
from mlxmm.modules.qwen3_aligner import Qwen3Aligner
from mlxmm.recipes.parts.alignment import FLICKR30K_PRESETS, FLICKR30K_ROWS, AlignmentConfig, plan_alignment
from tools.make_real_layouts import MODELS

# What Metal recommends (recommendedMaxWorkingSetSize) of a Mac's memory, by the GB it is sold with: two thirds, as logs
# of llama.cpp on Macs print it: 5461 MiB (li-plus/chatglm.cpp#76), 10923 MiB (ise-uiuc/magicoder#19) and 21845 MiB
# (ollama/ollama#434). Newer versions of macOS recommend more on some machines.
WORKING_SETS = {8: 5461 * 2**20, 16: 10_923 * 2**20, 32: 21_845 * 2**20}
COLUMNS = ("weights", "optimizer", "activations", "kept", "total", "disk")


@attrs.frozen
class Need:
    """The plan of a preset on the Mac that it is for, whose memory is `machine` GB."""

    machine: int
    plan: MemoryPlan

    @property
    def fits(self) -> bool:
        return self.plan.total <= WORKING_SETS[self.machine]


def needs() -> dict[str, Need]:
    """For each preset, what it needs on Metal."""
    os.environ["MLXMM_ACT_AS"] = "gpu"
    with tempfile.TemporaryDirectory() as folder:
        return {name: need(preset.about, preset.config, Path(folder)) for name, preset in FLICKR30K_PRESETS.items()}


def need(about: str, config: AlignmentConfig, folder: Path) -> Need:
    """The last number in `about` is the memory of the Mac, in GB. The settings of models are written into `folder`."""
    machine = int(re.findall(r"(\d+) GB", about)[-1])
    plan = plan_alignment(config, unloaded(config, folder), FLICKR30K_ROWS)
    return Need(machine, attrs.evolve(plan, kept=int(KEPT_SHARE * WORKING_SETS[machine])))


def unloaded(config: AlignmentConfig, folder: Path, *, tiny: bool = False) -> Qwen3Aligner:
    """The aligner of a preset with weights that nothing has computed. Settings are written into `folder`."""
    parts = {part: getattr(config.module, part) for part in ("vision", "lm")}
    for name in parts.values():
        if not (folder / name).exists():
            attrs.evolve(MODELS[name](tiny), weights={}).write(folder / name, seed=0)
    folders = {part: str(folder / name) for part, name in parts.items()}
    return Qwen3Aligner.unloaded(attrs.evolve(config.module, **folders))


def table(found: dict[str, Need]) -> str:
    head = ("preset", *COLUMNS, "for a Mac with", "its working set")
    rows = [head, ("---",) * len(head)]
    for name, need in found.items():
        sizes = [f"{getattr(need.plan, column) / GIB:.1f}" for column in COLUMNS]
        rows.append((f"`{name}`", *sizes, f"{need.machine} GB", f"{WORKING_SETS[need.machine] / GIB:.1f}"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(table(needs()))
