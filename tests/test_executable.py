"""Which programs the preload library gets into, told from their files before they start."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import flockshim
from flockshim import executable, launch

MODULE = [sys.executable, "-m", "flockshim"]
BASE = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD" and not name.startswith("FLOCKSHIM_")}
NOBODY = 65534

# Exits with 7, after it has printed its arguments.
PROGRAM = r"""
#include <stdio.h>
int main(int argc, char **argv) {
    for (int i = 0; i < argc; i++) printf("[%s]", argv[i]);
    return 7;
}
"""


def need(tool: str, package: str) -> None:
    if shutil.which(tool) is None:
        reason = f"{tool} is missing: install the package {package}"
        if os.environ.get("FLOCKSHIM_REQUIRE_OPTIONAL") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


def start(*command: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MODULE, *command],
        env=BASE,
        capture_output=True,
        text=True,
        check=False,
        **more,
    )


def refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert (result.returncode, result.stdout) == (125, "")
    assert result.stderr.startswith("flockshim: ") and result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def not_by_preload(*command: str | Path, words: tuple[str, ...], **more: Any) -> None:
    """The library alone is refused for COMMAND, and what would do is named."""
    result = start("--via", "preload", *command, **more)
    refused(result, *words, ", so the lock shim cannot work in it: use --via seccomp\n")


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Compiles PROGRAM with the compiler and options given, once each."""
    directory = tmp_path_factory.mktemp("built")
    (directory / "program.c").write_text(PROGRAM)

    def build(compiler: str, *options: str) -> Path:
        need(compiler, {"musl-gcc": "musl-tools"}.get(compiler, compiler))
        path = directory / "-".join([compiler, *options]).replace("/", "_")
        if not path.exists():
            command = [compiler, *options, "-o", str(path), str(directory / "program.c")]
            subprocess.run(command, check=True)
        return path

    return build


@pytest.fixture
def dynamic(built: Callable[..., Path]) -> Path:
    return built("gcc")


@pytest.fixture
def static(built: Callable[..., Path]) -> Path:
    return built("gcc", "-static")


@pytest.mark.parametrize("option", ["-pie", "-no-pie", "-s"])
def test_dynamic_programs_are_started(option: str, built: Callable[..., Path]) -> None:
    program = built("gcc", option)
    assert start(program, "x").stdout == f"[{program}][x]"
    assert start(program).returncode == 7


def test_dynamic_musl_program_is_started(built: Callable[..., Path]) -> None:
    assert start(built("musl-gcc")).returncode == 7


@pytest.mark.parametrize(
    ("compiler", "option"),
    [("gcc", "-static"), ("gcc", "-static-pie"), ("musl-gcc", "-static")],
)
@pytest.mark.parametrize("mode", ["auto", "host", "success"])
def test_static_programs_are_not_for_the_library(
    compiler: str, option: str, mode: str, built: Callable[..., Path]
) -> None:
    program = built(compiler, option)
    not_by_preload("--mode", mode, program, words=(repr(str(program)), "statically linked"))


def test_fail_asks_for_nothing_unless_it_simulates(static: Path) -> None:
    assert start("--mode", "fail", static).returncode == 7
    assert start("--mode", "fail", "env", "-i", static).returncode == 7
    assert start("--mode", "fail", "--via", "preload", static).returncode == 7
    not_by_preload("--mode", "fail", "--simulate", "ENOSYS", static, words=("statically linked",))


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["-ldflags=-buildid="],
        ["-buildmode=pie"],
        ["-buildmode=pie", "-ldflags=-buildid= -s -w"],
    ],
)
def test_go_programs_are_not_for_the_library(options: list[str], tmp_path: Path) -> None:
    need("go", "golang")
    source = tmp_path / "main.go"
    source.write_text('package main\nimport "os"\nfunc main() { os.Exit(7) }\n')
    program = tmp_path / "program"
    env = {**BASE, "GOFLAGS": "", "GO111MODULE": "off"}
    subprocess.run(["go", "build", *options, "-o", program, source], env=env, check=True)
    assert subprocess.run([program], check=False).returncode == 7
    word = "Go program" if "-ldflags=-buildid=" not in options else "statically linked"
    not_by_preload(program, words=(word,))


def header(program: Path, *changes: tuple[int, bytes]) -> bytes:
    data = bytearray(program.read_bytes())
    for offset, value in changes:
        data[offset : offset + len(value)] = value
    return bytes(data)


def foreign_machine() -> tuple[int, str]:
    return (183, "AArch64") if os.uname().machine == "x86_64" else (62, "x86-64")


def test_programs_for_other_machines_are_not_for_the_library(dynamic: Path, tmp_path: Path) -> None:
    number, name = foreign_machine()
    foreign = tmp_path / "foreign"
    for changes, word in [
        ([(18, number.to_bytes(2, "little"))], name),
        ([(4, b"\1"), (18, b"\3\0")], "32-bit x86"),
        ([(4, b"\1")], "32-bit"),
        ([(18, b"\xf3\0")], "64-bit ELF machine 243"),
    ]:
        foreign.write_bytes(header(dynamic, *changes))
        foreign.chmod(0o755)
        not_by_preload(foreign, words=("is built for another kind of machine", word))
        try:
            status, message = subprocess.run([foreign], check=False, capture_output=True).returncode, ""
        except OSError as error:
            status, message = 126, f"flockshim: {str(foreign)!r}: {error.strerror}\n"
        result = start(foreign)
        assert (result.returncode, result.stderr) == (status, message)


@pytest.mark.parametrize("size", [5, 19, 40, 63, 64, 300])
def test_truncated_program(size: int, dynamic: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    cut.write_bytes(dynamic.read_bytes()[:size])
    cut.chmod(0o755)
    result = start(cut)
    assert (result.returncode, result.stdout) == (126, "")
    assert result.stderr == f"flockshim: {str(cut)!r}: Exec format error\n"


def test_object_file_is_no_program(tmp_path: Path, dynamic: Path) -> None:
    relocatable = tmp_path / "object"
    relocatable.write_bytes(header(dynamic, (16, b"\1\0")))
    relocatable.chmod(0o755)
    assert start(relocatable).returncode == 126


def test_unknown_binary_format(tmp_path: Path) -> None:
    unknown = tmp_path / "unknown"
    unknown.write_bytes(b"MZ\x90\0\3\0")
    unknown.chmod(0o755)
    result = start(unknown)
    assert result.returncode == 126 and "Unknown executable format" in result.stderr


def as_nobody(call: Callable[[], object]) -> str:
    """What CALL raises, if anything, in a process of an ordinary user."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        text = "child failed"
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            call()
            text = ""
        except (flockshim.FlockshimError, OSError) as error:
            text = str(error)
        finally:
            os.write(writing, text.encode())
            os._exit(0)
    os.close(writing)
    with open(reading) as answer:
        text = answer.read()
    os.wait()
    return text


@pytest.fixture
def public(dynamic: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of a dynamic program in a directory that everybody may enter, as tmp_path is not."""
    if os.geteuid() != 0:
        pytest.skip("only root can make files of somebody else's: run the tests as root")
    directory = Path(tempfile.mkdtemp(prefix="flockshim-test-"))
    directory.chmod(0o755)
    shutil.copy(Path(launch.HOME, launch.LIBRARY), directory)
    monkeypatch.setattr(launch, "HOME", str(directory))
    program = directory / "program"
    shutil.copy(dynamic, program)
    program.chmod(0o755)
    yield program
    shutil.rmtree(directory)


def judged_by_nobody(program: Path) -> str:
    return as_nobody(lambda: executable.protected([str(program)], {}))


@pytest.mark.parametrize("mode", [0o4755, 0o2755])
def test_program_of_another_identity_is_refused(mode: int, public: Path) -> None:
    assert judged_by_nobody(public) == ""
    public.chmod(mode)
    assert "set-uid" in judged_by_nobody(public)
    executable.protected([str(public)], {})  # root's own: nothing changes for root
    public.chmod(mode & ~0o044)  # not readable either, as sudo is often installed
    assert "set-uid" in judged_by_nobody(public)
    os.chown(public, NOBODY, NOBODY)
    public.chmod(mode)
    assert judged_by_nobody(public) == ""
    with pytest.raises(flockshim.FlockshimError, match="set-uid"):
        executable.protected([str(public)], {})


def test_set_gid_without_execution_by_the_group_is_no_privilege(public: Path) -> None:
    public.chmod(0o2745)
    assert judged_by_nobody(public) == ""


def test_program_with_capabilities_is_refused(public: Path) -> None:
    # struct vfs_cap_data (linux/capability.h): revision 2, effective; CAP_NET_BIND_SERVICE.
    words = (0x02000001, 1 << 10, 0, 0, 0)
    value = b"".join(word.to_bytes(4, "little") for word in words)
    os.setxattr(public, "security.capability", value)
    assert "capabilities" in judged_by_nobody(public)
    executable.protected([str(public)], {})


def test_unreadable_program_is_refused(public: Path) -> None:
    public.chmod(0o711)
    assert "cannot be read" in judged_by_nobody(public)


def test_script_of_a_static_interpreter_is_not_for_the_library(static: Path, tmp_path: Path) -> None:
    inner = script(tmp_path / "inner", f"#! {static} -x\n")
    outer = script(tmp_path / "outer", f"#!{inner}\n")
    message = f"{str(outer)!r} is run by {str(static)!r}, which is statically linked"
    not_by_preload(outer, words=(message,))


def test_script_of_a_relative_interpreter(dynamic: Path, static: Path, tmp_path: Path) -> None:
    shutil.copy(dynamic, tmp_path / "good")
    shutil.copy(static, tmp_path / "bad")
    script(tmp_path / "s", "#!good\n")
    script(tmp_path / "t", "#!./bad\n")
    assert start("./s", cwd=tmp_path).stdout == "[good][./s]"
    not_by_preload("./t", cwd=tmp_path, words=("'./bad'",))


def test_script_of_a_bad_interpreter(tmp_path: Path) -> None:
    missing = script(tmp_path / "missing", "#!/no/such\n")
    result = start(missing)
    assert result.returncode == 127
    expected = f"'/no/such' (the interpreter of {str(missing)!r}): {os.strerror(2)}"
    assert result.stderr == f"flockshim: {expected}\n"
    plain = tmp_path / "plain"
    plain.touch()
    assert start(script(tmp_path / "denied", f"#!{plain}\n")).returncode == 126
    assert start(script(tmp_path / "directory", f"#!{tmp_path}\n")).returncode == 126


@pytest.mark.parametrize("levels", [4, 5, 6])
def test_scripts_of_scripts_as_far_as_the_kernel_follows(levels: int, dynamic: Path, tmp_path: Path) -> None:
    path = dynamic
    for level in range(levels):
        path = script(tmp_path / f"level{level}", f"#!{path}\n")
    try:
        native = subprocess.run([path], check=False, capture_output=True, text=True)
    except OSError:
        assert start(path).returncode == 126
    else:
        assert start(path).stdout == native.stdout


@pytest.mark.parametrize(
    "line",
    [
        "#!{} \n",
        "#! \t {}\targument \t\n",
        "#!{} two words\n",
        "#!{} -a -b=c\r\n",
        "#!{}",
        "#!{} " + 300 * "a",
        "#!{} before\0after\n",
        "#!{}\0after",
        "#!{}\0" + 300 * "a",
        "#!{}" + 300 * " ",
        "#!" + 150 * " " + "{}\n",
    ],
)
def test_first_line_is_read_as_the_kernel_does(line: str, dynamic: Path) -> None:
    # The kernel looks at 256 bytes in all, so the paths must be short.
    directory = Path("/tmp", f"fs-{os.getpid()}")
    directory.mkdir()
    try:
        interpreter = directory / "i"
        shutil.copy(dynamic, interpreter)
        path = script(directory / "s", line.format(interpreter))
        native = subprocess.run([path], check=False, capture_output=True).stdout
        words = executable._interpreter(path.read_bytes())
        assert native.decode() == "".join(f"[{word}]" for word in [*words, str(path)])
    finally:
        shutil.rmtree(directory)


@pytest.mark.parametrize("line", ["#!\n", "#!", "#! \t\n", "#!/" + 300 * "a" + "\n"])
def test_first_line_that_the_kernel_refuses_leaves_it_to_the_shell(line: str, tmp_path: Path) -> None:
    path = script(tmp_path / "s", line + "\necho shell\n")
    with pytest.raises(OSError, match="Exec format error"):
        subprocess.run([path], check=False)
    assert start(path).stdout == "shell\n"


def test_other_programs_that_start_programs_are_not_seen_through(static: Path) -> None:
    # What nice starts is as far from the launcher as what a shell starts: its own business.
    assert start("nice", static).returncode == 7
