"""The Hub's name: one look-up that fails is no proof that there is no network."""

import socket
import time

import pytest

from mlxmm.storage import hub


@pytest.mark.parametrize(("num_failures", "is_offline"), [(0, False), (2, False), (9, True)])
def test_the_name_of_the_hub_is_looked_up_three_times_before_all_is_taken_from_the_cache(
    monkeypatch, num_failures, is_offline, capsys
):
    from huggingface_hub import constants

    asked = []

    def look_up(host, port):
        asked.append(host)
        if len(asked) <= num_failures:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    start = time.monotonic()
    hub.go_offline_without_network.__wrapped__()
    assert constants.HF_HUB_OFFLINE == is_offline == ("no network" in capsys.readouterr().out)
    assert len(asked) == min(num_failures + 1, 3) and time.monotonic() - start < 3
