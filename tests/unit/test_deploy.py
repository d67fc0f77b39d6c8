"""The systemd unit agrees with the program that it starts."""

from __future__ import annotations

import configparser
from pathlib import Path

from router.arguments import make_parser
from router.config import Options
from router.errors import EXIT_CONFIG, EXIT_USAGE
from router.lifecycle import FAREWELL_S

UNIT = Path(__file__).resolve().parent.parent.parent / "tools" / "deploy" / "router.service"


def test_the_unit_fits_the_router() -> None:
    unit = configparser.ConfigParser(interpolation=None, strict=True, delimiters=("=",))
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(UNIT.read_text())
    service = unit["Service"]
    assert service["Type"] == "notify"
    assert service["KillMode"] == "mixed"
    assert int(service["TimeoutStopSec"]) > Options().drain_timeout + FAREWELL_S + 10
    prevented = {int(code) for code in service["RestartPreventExitStatus"].split()}
    assert prevented == {EXIT_USAGE, EXIT_CONFIG}
    assert service["OOMPolicy"] == "continue"
    _program, *words = service["ExecStart"].split()
    assert make_parser().parse_known_args(words)[1] == []
