"""Give MLX a fast BLAS on Linux CPUs, at import. MLXMM_BLAS=off leaves MLX as it is.

MLX's Linux wheels carry the reference BLAS and LAPACK, whose products take some 40 times as long as OpenBLAS's.
libmlx.so calls them through its procedure linkage table: one slot of memory for each function, which the dynamic
linker fills on the first call. `enable` writes the addresses of OpenBLAS (the package scipy-openblas32) into
these slots: in this process only, nothing on disk. If anything is not as expected, MLX stays as it was.

ELF names (DT_..., PT_..., st_..., r_...) are those of the System V ABI, https://refspecs.linuxfoundation.org/elf/.
The file is read by hand because every import pays for it: 1 ms here, 210 ms with pyelftools (70 to import it, 140 to
read 821 relocations).
"""

import contextlib
import ctypes
import importlib.util
import mmap
import os
import re
import struct
import sys
from pathlib import Path
from typing import NamedTuple

ELF64_LITTLE_ENDIAN = b"\x7fELF\x02\x01"  # e_ident: magic number, ELFCLASS64, ELFDATA2LSB
ET_DYN = 3
JUMP_SLOT = {62: 7, 183: 1026}  # e_machine -> relocation type: R_X86_64_JUMP_SLOT, R_AARCH64_JUMP_SLOT
PT_LOAD, PT_DYNAMIC = 1, 2
DT_NULL, DT_PLTRELSZ, DT_STRTAB, DT_SYMTAB, DT_PLTREL, DT_RELA, DT_JMPREL = 0, 2, 5, 6, 20, 7, 23
SIZEOF_DYN, SIZEOF_SYM, SIZEOF_RELA = 16, 24, 24
SHN_UNDEF = 0  # st_shndx of a symbol that another library provides
MAX_NAME = 256  # mangled C++ names are longer and not needed

BLAS_NAME = re.compile(r"cblas_[a-z0-9]+|[sdcz][a-z0-9]{3,6}_")  # cblas_sgemm; sgesdd_, the Fortran names of LAPACK
REFERENCE_NAME = re.compile(r"lib(c?blas|lapack)\b.*\.so")  # libblas-bd8a282c.so.3.10.0, as the wheel has it
FAST_NAME = re.compile(r"openblas|mkl|blis|armpl|nvpl|accelerate")

ROW_MAJOR, NO_TRANSPOSE = 101, 111  # CBLAS_ORDER and CBLAS_TRANSPOSE in cblas.h

_status = "not enabled"
_provider: ctypes.CDLL | None = None  # OpenBLAS, once MLX uses it


class UnsupportedLayout(Exception):
    """The library is not laid out as in MLX's wheels; the message says what differs."""


class Mapping(NamedTuple):
    """One line of /proc/self/maps."""

    start: int
    end: int
    permissions: str  # "rw-p"
    offset: int
    path: str


def enable() -> str:
    """Give MLX a fast BLAS if this is Linux and the layout is as expected; return one line that says what happened."""
    global _status
    if _provider is None:
        try:
            _status = _enable()
        except Exception as error:  # noqa: BLE001  (without a fast BLAS MLX is slow but correct)
            _status = f"left alone: {error}"
    return _status


def status() -> str:
    """What the last `enable` said."""
    return _status


def set_num_threads(count: int) -> None:
    """Set the threads of the fast BLAS, to cores / ranks if ranks share a machine. No effect if not enabled."""
    if _provider is not None:
        _provider.scipy_openblas_set_num_threads(count)


def num_threads() -> int | None:
    """How many threads the fast BLAS uses; None when not enabled."""
    return None if _provider is None else _provider.scipy_openblas_get_num_threads()


def _enable() -> str:
    global _provider
    if not sys.platform.startswith("linux"):
        return "not Linux"
    import mlx.core  # noqa: F401  (maps libmlx.so)

    maps = read_maps()
    slots = find_slots(maps)
    server = _serving_library(slots["cblas_sgemm"], maps)
    if FAST_NAME.search(server):
        return f"already fast: {server}"
    path = _provider_path()
    if path is None:
        return "no provider: pip install scipy-openblas32"
    _check_reference(slots, server, maps)
    provider = ctypes.CDLL(path)
    _check_product(provider)
    overwrite({slots[name]: _address(provider, f"scipy_{name}") for name in slots})
    _provider = provider
    return f"scipy-openblas32: {len(slots)} symbols"


# ---- where the slots are


def find_slots(maps: list[Mapping]) -> dict[str, int]:
    """The address in memory of each BLAS and LAPACK slot of libmlx.so, by symbol."""
    images = [m for m in maps if m.path.endswith("/libmlx.so") and m.offset == 0]
    if len(images) != 1:
        raise UnsupportedLayout(f"libmlx.so is mapped {len(images)} times, not once")
    slots = read_jump_slots(images[0].path)
    if "cblas_sgemm" not in slots:
        raise UnsupportedLayout("libmlx.so imports no cblas_sgemm")
    return {name: images[0].start + address for name, address in slots.items()}


def read_jump_slots(path: str | Path) -> dict[str, int]:
    """The slot of each imported BLAS and LAPACK symbol, relative to where the library at `path` is loaded."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as elf:
        try:
            return _parse_jump_slots(elf)
        except (struct.error, KeyError, OverflowError, UnicodeDecodeError) as error:
            raise UnsupportedLayout(f"{path} is not an ELF library as expected: {error!r}") from error


def _parse_jump_slots(elf: mmap.mmap) -> dict[str, int]:
    jump_slot = _check_header(elf)
    loads, dynamic = _read_program_headers(elf)
    tags = _read_dynamic(elf, dynamic)
    if tags[DT_PLTREL] != DT_RELA:
        raise UnsupportedLayout("the linkage table has REL entries, not RELA")
    relocations, symbols, names = (_file_offset(loads, tags[t]) for t in (DT_JMPREL, DT_SYMTAB, DT_STRTAB))
    slots = {}
    for at in range(relocations, relocations + tags[DT_PLTRELSZ], SIZEOF_RELA):
        r_offset, r_info = struct.unpack_from("<QQ", elf, at)
        name = _imported_name(elf, symbols + SIZEOF_SYM * (r_info >> 32), names)
        if BLAS_NAME.fullmatch(name) and r_info & 0xFFFFFFFF == jump_slot:
            slots[name] = r_offset
    return slots


def _check_header(elf: mmap.mmap) -> int:
    """The relocation type of a slot on this machine, if `elf` is a shared library for it."""
    e_type, e_machine = struct.unpack_from("<HH", elf, 16)
    if elf[:6] != ELF64_LITTLE_ENDIAN or e_type != ET_DYN:
        raise UnsupportedLayout("not a 64-bit little-endian ELF library")
    if e_machine not in JUMP_SLOT:
        raise UnsupportedLayout(f"ELF for machine {e_machine}, neither x86_64 nor aarch64")
    return JUMP_SLOT[e_machine]


def _read_program_headers(elf: mmap.mmap) -> tuple[list[tuple], tuple[int, int]]:
    """The PT_LOAD segments as (address, file offset, size), and PT_DYNAMIC as (file offset, size)."""
    (e_phoff,) = struct.unpack_from("<Q", elf, 32)
    e_phentsize, e_phnum = struct.unpack_from("<HH", elf, 54)
    loads, dynamic = [], None
    for at in range(e_phoff, e_phoff + e_phentsize * e_phnum, e_phentsize or 1):
        p_type, _, p_offset, p_vaddr, _, p_filesz = struct.unpack_from("<IIQQQQ", elf, at)
        if p_type == PT_LOAD:
            loads.append((p_vaddr, p_offset, p_filesz))
        elif p_type == PT_DYNAMIC:
            dynamic = (p_offset, p_filesz)
    if not loads or loads[0][:2] != (0, 0) or dynamic is None:
        raise UnsupportedLayout("no segment at address 0, or no dynamic segment")
    return loads, dynamic


def _read_dynamic(elf: mmap.mmap, dynamic: tuple[int, int]) -> dict[int, int]:
    """The entries of the dynamic segment, by tag."""
    offset, size = dynamic
    tags = {}
    for at in range(offset, offset + size, SIZEOF_DYN):
        d_tag, d_val = struct.unpack_from("<QQ", elf, at)
        if d_tag == DT_NULL:
            break
        tags[d_tag] = d_val
    return tags


def _file_offset(loads: list[tuple], address: int) -> int:
    """Where in the file the byte is that will be at `address`."""
    for p_vaddr, p_offset, p_filesz in loads:
        if p_vaddr <= address < p_vaddr + p_filesz:
            return address - p_vaddr + p_offset
    raise UnsupportedLayout(f"address {address:#x} is in no segment")


def _imported_name(elf: mmap.mmap, symbol: int, names: int) -> str:
    """The name of the symbol at file offset `symbol`; empty if the library defines it itself."""
    st_name, _, st_shndx = struct.unpack_from("<IHH", elf, symbol)
    start = names + st_name
    end = elf.find(b"\0", start, start + MAX_NAME)
    return elf[start:end].decode() if st_shndx == SHN_UNDEF and end > start else ""


# ---- which library the slots lead to


def _serving_library(slot: int, maps: list[Mapping]) -> str:
    """The file name of the library that a call through the cblas_sgemm slot reaches."""
    library = _library_at(_read_slot(slot, maps), maps)
    if library.name != "libmlx.so":
        return library.name
    # Not called yet, so the slot still leads to the linker, which looks among the global symbols first,
    # where LD_PRELOAD puts its own, and then in the libraries libmlx.so is linked with.
    for scope in (ctypes.CDLL(None), ctypes.CDLL(library)):
        if hasattr(scope, "cblas_sgemm"):
            return _library_at(_address(scope, "cblas_sgemm"), maps).name
    raise UnsupportedLayout("no library has cblas_sgemm")


def _check_reference(slots: dict[str, int], server: str, maps: list[Mapping]) -> None:
    """Raise unless each slot leads to the linker (through libmlx.so) or to the reference library."""
    names = {_library_at(_read_slot(slot, maps), maps).name for slot in slots.values()}
    for name in names - {"libmlx.so"} | {server}:
        if not REFERENCE_NAME.match(name):
            raise UnsupportedLayout(f"MLX takes its BLAS from {name}")


def _read_slot(slot: int, maps: list[Mapping]) -> int:
    mapping = _mapping_at(slot, maps)
    if not mapping.path.endswith("/libmlx.so"):
        raise UnsupportedLayout(f"slot {slot:#x} is in {mapping.path}, not in libmlx.so")
    return ctypes.c_uint64.from_address(slot).value


def _library_at(address: int, maps: list[Mapping]) -> Path:
    """The file mapped at `address`, links resolved: Debian's libblas.so.3 may be a link to OpenBLAS."""
    return Path(_mapping_at(address, maps).path).resolve()


def _mapping_at(address: int, maps: list[Mapping]) -> Mapping:
    for mapping in maps:
        if mapping.start <= address < mapping.end:
            return mapping
    raise UnsupportedLayout(f"nothing is mapped at {address:#x}")


def _provider_path() -> Path | None:
    spec = importlib.util.find_spec("scipy_openblas32")
    return spec and Path(spec.origin).parent / "lib" / "libscipy_openblas.so"


def _address(library: ctypes.CDLL, name: str) -> int:
    try:
        return ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    except AttributeError:
        raise UnsupportedLayout(f"{library._name} has no {name}") from None


def _check_product(provider: ctypes.CDLL) -> None:
    """Multiply (2, 3) by (3, 2) with the provider; raise if the product is wrong.

    This is done before any slot changes, so there is nothing to undo. The library is called directly, because a
    product of MLX would start its threads at import, and forking would no longer be safe.
    """
    floats = ctypes.c_float * 6
    a, b, c = floats(1, 2, 3, 4, 5, 6), floats(7, 8, 9, 10, 11, 12), floats()
    sizes, one, zero = (2, 2, 3), ctypes.c_float(1), ctypes.c_float(0)
    provider.scipy_cblas_sgemm(ROW_MAJOR, NO_TRANSPOSE, NO_TRANSPOSE, *sizes, one, a, 3, b, 2, zero, c, 2)
    if c[:4] != [58, 64, 139, 154]:
        raise UnsupportedLayout(f"scipy-openblas32 multiplies wrongly: {c[:4]}")


# ---- writing


def overwrite(values: dict[int, int]) -> None:
    """Write each value to its address; none of them if their pages cannot be made writable."""
    with _writable(min(values), max(values) + 8):
        for address, value in values.items():
            ctypes.c_uint64.from_address(address).value = value  # aligned, so other threads never read half of it


@contextlib.contextmanager
def _writable(start: int, end: int):
    """Within the block, memory from `start` to `end` is writable; afterwards its protection is restored."""
    mapping = _mapping_at(start, read_maps())
    if mapping.end < end:
        raise UnsupportedLayout("the slots are not in one mapping")
    if "w" in mapping.permissions:
        yield
        return
    flags = zip("rwx", (mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC), strict=True)
    found = sum(flag for letter, flag in flags if letter in mapping.permissions)
    _protect(start, end, found | mmap.PROT_WRITE)
    try:
        yield
    finally:
        _protect(start, end, found)


def _protect(start: int, end: int, protection: int) -> None:
    first = start - start % mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(first), ctypes.c_size_t(end - first), protection):
        raise UnsupportedLayout(f"mprotect: {os.strerror(ctypes.get_errno())}")


def read_maps() -> list[Mapping]:
    """What is mapped into this process, in order of address."""
    mappings = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, offset, _, _, *path = line.split(None, 5)  # the path may have spaces
        start, end = (int(number, 16) for number in span.split("-"))
        mappings.append(Mapping(start, end, permissions, int(offset, 16), path[0] if path else ""))
    return mappings
