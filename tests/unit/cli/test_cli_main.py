import subprocess
import sys

import pytest

from cli.config_docs import PAGE, render
from cli.main import SUBCOMMANDS, main


def test_an_unknown_command_is_one_sentence_and_status_2(capsys):
    assert main(["dance"]) == 2
    assert capsys.readouterr().err == "tandem: There is no command 'dance'; see tandem --help.\n"


def test_help_lists_every_command(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in SUBCOMMANDS)


def test_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("tandem ")


@pytest.mark.parametrize("command", ["router", "prefill", "decode"])
def test_a_service_without_redis_says_so(capsys, command, monkeypatch):
    monkeypatch.delenv("TANDEM_REDIS_URL", raising=False)
    assert main([command]) == 2
    assert "--redis-url" in capsys.readouterr().err


def test_commands_need_no_torch_to_be_read():
    script = (
        "import sys, cli.main, cli.serve, cli.ps, cli.config_docs; "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_settings_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == render(), "run `make docs`"
