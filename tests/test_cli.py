"""The `basicsr` command: its help, and one sentence for whatever goes wrong."""

import platform
import subprocess
import sys

import pytest
from torch._utils import ExceptionWrapper

from rwkvir import cli, pipeline
from rwkvir.command_line import sentence


@pytest.mark.parametrize("words, expected", [([], "commands:"), (["--version"], "rwkvir 0.")])
def test_help_and_version_need_no_torch(words, expected):
    code = f"import sys; from rwkvir import cli; cli.main({words}); assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and expected in result.stdout, result.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc")
def test_freed_memory_is_kept():
    """Of nine tensors of 64 MiB a pass, 16384 pages each, most are made of those of passes before."""
    code = (
        "import resource, torch\nfrom rwkvir import cli\ncli.main([])\ntorch.set_grad_enabled(False)\n"
        "network = torch.nn.Sequential(*(f() for _ in range(4) for f in (torch.nn.GELU, torch.nn.Sigmoid)))\n"
        "for _ in range(8): network(torch.ones(1 << 24))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert int(result.stdout.split()[-1]) < 8 * 9 * 16384 / 2, result.stderr


@pytest.mark.parametrize("command", ["train", "test"])
def test_the_help_of_train_and_test_names_every_flag_of_basicsr(capsys, command):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for flag in ("-opt", "--launcher", "--auto_resume", "--debug", "--local_rank", "--local-rank", "--force_yml"):
        assert flag in text


def test_an_unknown_command_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["trian"])
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert all(name in errors for name in cli.COMMANDS)


def test_info_tells_versions_devices_and_the_operator(workspace):
    result = workspace.run("info")
    assert result.returncode == 0, result.stderr
    facts = [line.split(":")[0] for line in result.stdout.splitlines()]
    for name in ("rwkvir", "Python", "torch", "torchvision", "basicsr", "numpy", "cv2", "lmdb", "CPU", "CUDA devices"):
        assert name in facts
    assert any(fact.startswith("operator ") for fact in facts)


def test_a_missing_option_file_is_named(capsys):
    assert cli.main(["train", "-opt", "absent.yml"]) == 1
    assert "the option file absent.yml does not exist" in capsys.readouterr().err


def test_both_spellings_of_the_rank_and_the_environment_reach_basicsr(monkeypatch):
    def flags(*words: str) -> list[str]:
        return pipeline._stock_flags(pipeline._parser("train").parse_args(["-opt", "x.yml", *words]))

    assert flags("--local-rank", "3") == flags("--local_rank=3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert flags() == ["-opt", "x.yml", "--launcher", "none", "--local_rank", "3"]
    everything = ["--auto_resume", "--debug", "--force_yml", "name=x", "num_gpu=0"]
    assert flags(*everything)[-5:] == everything


@pytest.fixture
def failing(monkeypatch):
    """Makes `basicsr info` raise the given exception."""

    def install(error: BaseException) -> None:
        def raise_it(argv: list[str]) -> int:
            raise error

        monkeypatch.setattr(cli, "info", raise_it)

    return install


@pytest.mark.parametrize(
    "error, expected",
    [
        (ValueError("two\nlines"), "two lines"),
        (FileNotFoundError(2, "No such file or directory", "x.png"), "No such file or directory: x.png"),
        (OSError("disk on fire"), "disk on fire"),
        (AssertionError("lq and gt differ"), "lq and gt differ"),
        (AssertionError(), "AssertionError: no message; run again with --debug for the traceback"),
        (TypeError("no len()"), "TypeError: no len(); run again with --debug for the traceback"),
        (KeyError("scale"), "KeyError: 'scale'; run again with --debug for the traceback"),
    ],
)
def test_an_exception_is_one_sentence(capsys, failing, error, expected):
    failing(error)
    assert cli.main(["info"]) == 1
    assert capsys.readouterr().err == f"basicsr info: {expected}\n"


def test_debug_shows_the_traceback_and_an_interruption_is_130(capsys, failing):
    failing(ValueError("reason"))
    with pytest.raises(ValueError, match="reason"):
        cli.main(["info", "--debug"])
    failing(KeyboardInterrupt())
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "basicsr info: interrupted\n"


@pytest.mark.parametrize(
    "error, expected",
    [
        (ValueError("x.png is not an image"), "x.png is not an image"),
        (ValueError("two\nlines"), "two lines"),
        (KeyError("gt_size"), "KeyError: 'gt_size'; run again with --debug for the traceback"),
        (TypeError("no len()"), "TypeError: no len(); run again with --debug for the traceback"),
        (
            UnicodeDecodeError("ascii", b"\xe9", 0, 1, "ordinal not in range(128)"),
            "UnicodeDecodeError: 'ascii' codec can't decode byte 0xe9 in position 0: ordinal not in range(128); "
            "run again with --debug for the traceback",
        ),
    ],
)
def test_an_error_of_a_worker_is_the_one_that_the_worker_had(error, expected):
    try:
        raise error
    except Exception:
        passed_on = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(Exception, match=r"Caught \w+ in DataLoader worker process 0") as caught:
        passed_on.reraise()
    assert sentence(caught.value) == expected
