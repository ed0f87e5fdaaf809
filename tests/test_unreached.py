"""A program under the shim starts one that the library does not get into: the user is told, once."""

from __future__ import annotations

import errno
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import shim_environment
from support.driver import EX, OK, UN, Fleet
from support.keepers import keepers
from support.proc import await_end
from support.programs import program

from flockshim.pytest_plugin import require

AFTER = " and not covered: it locks as without flockshim; to cover it, use flockshim --via seccomp COMMAND\n"
STATIC = "is statically linked"
GO = "is a Go program"
FOREIGN = "is built for another kind of machine"
WITHOUT = "is started without LD_PRELOAD"

# Type and machine of a program for this one: elf(5).
MACHINE = Path(sys.executable).read_bytes()[16:20]
DAY = 24 * 60 * 60

SOURCE = '#include <stdio.h>\nint main(void) { puts("ran"); return 0; }\n'
GO_SOURCE = 'package main\nimport "os"\nfunc main() { os.Stdout.WriteString("ran\\n") }\n'
CGO_SOURCE = GO_SOURCE.replace("import", 'import "C"\nimport', 1)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Compiles a program that prints one word, once for each compiler and options."""
    directory = tmp_path_factory.mktemp("unreached")
    (directory / "program.c").write_text(SOURCE)

    def build(compiler: str, *options: str) -> Path:
        require(shutil.which(compiler), f"no {compiler}", "apt install gcc libc6-dev musl-tools")
        path = directory / "-".join([compiler, *options])
        if not path.exists():
            subprocess.run([compiler, *options, "-o", str(path), str(directory / "program.c")], check=True)
        return path

    return build


@pytest.fixture(scope="module")
def go_built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Compiles a Go program, once for each source."""
    directory = tmp_path_factory.mktemp("go")

    def build(source: str) -> Path:
        require(shutil.which("go"), "no go", "apt install golang")
        path = directory / ("cgo" if source == CGO_SOURCE else "go")
        if not path.exists():
            path.with_suffix(".go").write_text(source)
            environment = {**os.environ, "GOFLAGS": "", "GO111MODULE": "off", "CGO_ENABLED": "1"}
            subprocess.run(["go", "build", "-o", path, path.with_suffix(".go")], env=environment, check=True)
        return path

    return build


@pytest.fixture
def static(built: Callable[..., Path]) -> Path:
    return built("gcc", "-static")


@pytest.fixture
def dynamic(built: Callable[..., Path]) -> Path:
    return built("gcc")


@pytest.fixture
def environment(rendezvous: Path) -> dict[str, str]:
    """That of one run of flockshim."""
    return shim_environment(rendezvous)


def run(environment: dict[str, str], *command: str | Path, status: int | None = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert status is None or done.returncode == status, done
    return done


def without_library(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name != "LD_PRELOAD"}


def told(environment: dict[str, str], *command: str | Path, status: int | None = 0) -> str:
    """What the command said on standard error."""
    return run(environment, *command, status=status).stderr


def line(path: str | Path, why: str) -> str:
    return f"flockshim: {path} {why}{AFTER}"


def script(path: Path, interpreter: str | Path, rest: str = "") -> Path:
    path.write_text(f"#!{interpreter}\n{rest}")
    path.chmod(0o755)
    return path


def markers(rendezvous: Path) -> list[str]:
    return sorted(name for name in os.listdir(rendezvous) if name.startswith("told-"))


# Who starts it

PYTHON = (sys.executable, "-c")
STARTERS: dict[str, Sequence[str]] = {
    "sh": ("sh", "-c", "{}; {}"),
    "sh exec": ("sh", "-c", "{}; exec {}"),
    "bash": ("bash", "-c", "{}; {}"),
    "make": ("make", "-s", "-f", "{makefile}"),
    "pipeline": ("bash", "-c", "{} | cat; {}"),
    "substitution": ("bash", "-c", 'echo "$({})"; {}'),
    "subprocess": (*PYTHON, "import subprocess as s; s.run(['{}']); s.run('{}', close_fds=False)"),
    "os.system": (*PYTHON, "import os; os.system('{}; {}')"),
    "os.execvp": (*PYTHON, "import os; os.system('{}'); os.execvp('{}', ['x'])"),
    "perl": ("perl", "-e", 'system("{}"); exec("{}", "x")'),
    "xargs": ("sh", "-c", "echo {} {} | xargs -n 1 env"),
    "env": ("sh", "-c", "env A=1 {}; env -u A {}"),
    "nice": ("sh", "-c", "nice {}; nice {}"),
    "timeout": ("sh", "-c", "timeout 60 {}; timeout 60 {}"),
    "find": ("find", "{}", "{}", "-exec", "{{}}", ";"),
    "nohup setsid": ("sh", "-c", "nohup {}; setsid -w {}"),
    "flock": ("sh", "-c", "flock -o / {}; flock / -c {}"),
}


@pytest.mark.parametrize("starter", STARTERS)
def test_each_starter_tells_once(environment: dict[str, str], static: Path, tmp_path: Path, starter: str) -> None:
    makefile = tmp_path / "Makefile"
    makefile.write_text(f"all:\n\t{static}\n\t{static}\n")
    command = [word.format(static, static, makefile=makefile) for word in STARTERS[starter]]
    require(shutil.which(command[0]), f"no {command[0]}", f"apt install {command[0]}")
    done = run(environment, *command)
    assert done.stdout == "ran\nran\n"
    assert done.stderr.replace("nohup: ignoring input\n", "") == line(static, STATIC)


@pytest.mark.parametrize("compiler", ["cc", "musl-gcc"])
@pytest.mark.parametrize("how", ["exec", "fork", "vfork", "thread", "signal"])
@pytest.mark.parametrize("function", ["execve", "execv", "execvp", "bare", "posix_spawn", "posix_spawnp"])
def test_each_function_in_each_c_library(
    environment: dict[str, str], static: Path, compiler: str, how: str, function: str
) -> None:
    """On the smallest stack of a thread, and on a small one of a signal handler, as elsewhere."""
    require(shutil.which(compiler), f"no {compiler}", "apt install gcc libc6-dev musl-tools")
    command = [program("starter", compiler), how, function, static]
    done = run(environment, *command)
    assert done.stderr == line(static, STATIC)
    assert done.stdout.startswith("ran\n")
    assert done.stdout == run(without_library(environment), *command).stdout


@pytest.mark.parametrize("compiler", ["cc", "musl-gcc"])
def test_execvp_searches_as_libc_does(
    environment: dict[str, str], static: Path, dynamic: Path, tmp_path: Path, compiler: str
) -> None:
    require(shutil.which(compiler), f"no {compiler}", "apt install gcc libc6-dev musl-tools")
    starter = program("starter", compiler)
    for name in ("plain", "directory/prog", "good", "last"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(static, tmp_path / "plain/prog")
    (tmp_path / "plain/prog").chmod(0o644)
    shutil.copy(static, tmp_path / "good/prog")
    shutil.copy(dynamic, tmp_path / "last/prog")

    def search(*names: str) -> str:
        path = ":".join(name and f"{tmp_path}/{name}" for name in names)
        done = run({**environment, "PATH": path}, starter, "exec", "execvp", "prog")
        assert done.stdout == "ran\n"
        return done.stderr

    long = "/".join(["x" * 200] * 10)
    assert search("none", "last", "good") == ""
    assert search(long, "plain", "directory", "plain/prog", "good") == line(f"{tmp_path}/good/prog", STATIC)


def test_a_path_too_long_to_look_at_is_not_taken_for_a_shorter_one(
    environment: dict[str, str], static: Path, dynamic: Path, tmp_path: Path
) -> None:
    # Of the last of the two names, 1023 bytes are the first.
    directory = str(tmp_path)
    while len(directory) < 1018:
        directory += "/" + "d" * min(200, 1018 - len(directory) - 1)
    os.makedirs(directory)
    shutil.copy(static, f"{directory}/prog")
    shutil.copy(dynamic, f"{directory}/program")
    done = run({**environment, "PATH": directory}, program("starter"), "exec", "execvp", "program")
    assert (done.stdout, done.stderr) == ("ran\n", "")


def test_execvp_looks_where_it_is_without_a_directory(
    environment: dict[str, str], static: Path, tmp_path: Path
) -> None:
    shutil.copy(static, tmp_path / "prog")
    for path, mode in (("/nowhere:", "a"), (":/nowhere", "b"), ("", "c")):
        env = {**environment, "PATH": path, "FLOCKSHIM_RUN": mode}
        starter = [program("starter"), "exec", "execvp", "prog"]
        done = subprocess.run(starter, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == ("ran\n", line("prog", STATIC))


# What is told


@pytest.mark.parametrize(
    ("compiler", "option"),
    [("gcc", "-static"), ("gcc", "-static-pie"), ("musl-gcc", "-static")],
)
def test_static_programs(environment: dict[str, str], built: Callable[..., Path], compiler: str, option: str) -> None:
    path = built(compiler, option)
    assert told(environment, "sh", "-c", f"{path}") == line(path, STATIC)


@pytest.mark.parametrize("source", [GO_SOURCE, CGO_SOURCE])
def test_go_programs(environment: dict[str, str], go_built: Callable[[str], Path], source: str) -> None:
    """With cgo it is linked like any other, and locks without the C library all the same."""
    path = go_built(source)
    assert run(environment, "sh", "-c", f"{path}").stderr == line(path, GO)


INTERPRETED, NOTED = 3, 4
GO_NOTE = struct.pack("<III4s8s", 4, 8, 4, b"Go", b"build id")


def noted(*notes: bytes, alignment: int = 4, at: int = 256) -> bytes:
    """The beginning of a dynamically linked program with these notes, elf(5)."""
    data = b"".join(notes)
    header = b"\x7fELF\2\1\1" + bytes(9) + MACHINE + struct.pack("<IQQQIHHHHHH", 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    segments = struct.pack("<IIQQQQQQ", INTERPRETED, 4, 64, 0, 0, 8, 8, 1)
    segments += struct.pack("<IIQQQQQQ", NOTED, 4, at, 0, 0, len(data), len(data), alignment)
    return (header + segments).ljust(at, b"\0") + data


def note(owner: bytes, kind: int, description: bytes, alignment: int = 4) -> bytes:
    data = struct.pack("<III", len(owner), len(description), kind) + owner
    data = data.ljust(-(-len(data) // alignment) * alignment, b"\0") + description
    return data.ljust(-(-len(data) // alignment) * alignment, b"\0")


@pytest.mark.parametrize(
    ("data", "tells"),
    [
        (noted(GO_NOTE), True),
        (noted(GO_NOTE, at=1020), True),
        (noted(GO_NOTE, at=3000), True),
        (noted(note(b"GNU\0", 1, b"12345"), GO_NOTE), True),
        (noted(note(b"four\0", 1, b"1"), GO_NOTE), True),
        (noted(note(b"GNU\0", 5, b"x" * 12, 8), GO_NOTE, alignment=8), True),
        (noted(note(b"GNU\0", 4, b"1234")), False),
        (noted(note(b"Go\0\0", 5, b"1234")), False),
        (noted(note(b"Gopher\0", 4, b"1234")), False),
        (noted(note(b"Go\0more\0", 4, b"1234")), False),
        (noted(GO_NOTE)[:-12], False),
        (noted(note(b"x" * 9, 9, b"")[:8] + b"\xff" * 8, GO_NOTE), False),
        (noted() + GO_NOTE, False),
    ],
)
def test_the_note_of_go(environment: dict[str, str], tmp_path: Path, data: bytes, tells: bool) -> None:
    path = tmp_path / "program"
    path.write_bytes(data)
    path.chmod(0o755)
    done = run(environment, program("starter"), "exec", "execve", path)
    assert done.stderr == (line(path, GO) if tells else "")
    assert "0 descriptors more" in done.stdout


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({4: b"\1", 18: b"\3\0"}, "is a 32-bit program"),
        ({4: b"\1"}, "is a 32-bit program"),
        ({18: b"\xf3\0"}, FOREIGN),
        ({5: b"\2"}, FOREIGN),
    ],
)
def test_programs_of_other_machines(
    environment: dict[str, str], dynamic: Path, tmp_path: Path, changes: dict[int, bytes], why: str
) -> None:
    data = bytearray(dynamic.read_bytes())
    for at, value in changes.items():
        data[at : at + len(value)] = value
    path = tmp_path / "foreign"
    path.write_bytes(data)
    path.chmod(0o755)
    assert told(environment, program("starter"), "vfork", "execve", path) == line(path, why)


def test_scripts_of_static_interpreters(environment: dict[str, str], static: Path, tmp_path: Path) -> None:
    inner = script(tmp_path / "inner", f" \t{static}\tan argument")
    outer = script(tmp_path / "outer", inner)
    assert told(environment, "sh", "-c", f"{outer}") == line(static, STATIC)


def test_no_more_scripts_than_the_kernel_follows(environment: dict[str, str], static: Path, tmp_path: Path) -> None:
    path = static
    starter = program("starter")
    for depth in range(1, 8):
        path = script(tmp_path / f"script{depth}", path)
        done = run({**environment, "FLOCKSHIM_RUN": f"{depth}"}, starter, "exec", "execve", path)
        assert done.stderr == (line(static, STATIC) if done.stdout == "ran\n" else "")
        assert (done.stdout == "ran\n") == (depth <= 5)


@pytest.mark.parametrize("length", [252, 253, 254, 255, 256])
def test_an_interpreter_whose_name_is_cut_off(
    environment: dict[str, str], static: Path, tmp_path: Path, length: int
) -> None:
    # Just as long as the kernel reads, or not.
    directory = tmp_path / ("d" * (length - len(str(tmp_path)) - 2 - 2))
    require(len(directory.name) > 0, "long temporary path", "TMPDIR=/tmp")
    directory.mkdir()
    shutil.copy(static, directory / "p")
    path = script(tmp_path / "script", directory / "p")
    done = run(environment, program("starter"), "exec", "execve", path)
    ran = done.stdout == "ran\n"
    assert done.stderr == (line(directory / "p", STATIC) if ran else "")
    assert ran == (length <= 254)


@pytest.mark.parametrize("command", ["env -i {}", "env -u LD_PRELOAD {}", "LD_PRELOAD= {}", "env LD_PRELOAD=x {}"])
def test_programs_without_the_variable(environment: dict[str, str], dynamic: Path, command: str) -> None:
    done = run(environment, "sh", "-c", command.format(dynamic))
    assert done.stdout == "ran\n"
    assert line(dynamic, WITHOUT) in done.stderr  # and what ld.so(8) says of a library that it does not find


def test_a_script_without_the_variable_goes_by_its_own_name(environment: dict[str, str], tmp_path: Path) -> None:
    path = script(tmp_path / "script", "/bin/sh", ":")
    assert told(environment, "env", "-i", path) == line(path, WITHOUT)


@pytest.mark.parametrize("form", ["{}", "{}:", "x.so:{}", "x.so {} y.so", ":{}\ty.so", "/elsewhere/libflockshim.so"])
def test_the_variable_names_the_library(environment: dict[str, str], dynamic: Path, form: str) -> None:
    value = form.format(environment["LD_PRELOAD"])
    assert "flockshim:" not in told(environment, "sh", "-c", f'LD_PRELOAD="{value}" {dynamic}')


@pytest.mark.parametrize("form", ["{}.old", "my{}", "{}/other.so"])
def test_the_variable_names_another_library(environment: dict[str, str], dynamic: Path, form: str) -> None:
    value = form.format("libflockshim.so")
    assert line(dynamic, WITHOUT) in told(environment, "sh", "-c", f'LD_PRELOAD="/x/{value}" {dynamic}')


# What is not told


@pytest.mark.parametrize("compiler", ["gcc", "musl-gcc"])
def test_covered_programs(
    environment: dict[str, str], built: Callable[..., Path], compiler: str, tmp_path: Path
) -> None:
    path = built(compiler)
    assert told(environment, "sh", "-c", f"{path}; {script(tmp_path / 'script', path)}") == ""


@pytest.mark.parametrize("compiler", ["gcc", "musl-gcc"])
def test_a_program_started_by_its_dynamic_linker(
    environment: dict[str, str], built: Callable[..., Path], compiler: str
) -> None:
    path = built(compiler)
    headers = subprocess.run(["readelf", "-l", path], capture_output=True, text=True, check=True).stdout
    (linker,) = re.findall(r"interpreter: (.*)]", headers)
    done = run(environment, "sh", "-c", f"{linker} {path}")
    assert (done.stdout, done.stderr) == ("ran\n", "")


@pytest.mark.parametrize("mode", [0o4755, 0o2755, 0o6711])
def test_set_uid_programs(environment: dict[str, str], static: Path, tmp_path: Path, mode: int) -> None:
    path = shutil.copy(static, tmp_path / "privileged")
    os.chmod(path, mode)
    assert told(environment, "sh", "-c", f"{path}; env -i {path}") == ""


def test_programs_with_capabilities(environment: dict[str, str], static: Path, tmp_path: Path) -> None:
    path = shutil.copy(static, tmp_path / "capable")
    try:
        # VFS_CAP_REVISION_2 with CAP_CHOWN: linux/capability.h
        os.setxattr(path, "security.capability", struct.pack("<IIIII", 0x02000000, 1, 0, 0, 0))
    except OSError as error:
        require(False, f"no file capabilities: {error}", "run as root on a file system with attributes")
    assert told(environment, "sh", "-c", f"{path}") == ""


@pytest.mark.parametrize(
    ("case", "number"),
    [
        ("missing", errno.ENOENT),
        ("not executable", errno.EACCES),
        ("script not executable", errno.EACCES),
        ("interpreter not executable", errno.EACCES),
        ("no program", errno.ENOEXEC),
        ("its own interpreter", errno.ELOOP),
        ("NULL", errno.EFAULT),
    ],
)
def test_what_cannot_be_executed(
    environment: dict[str, str], static: Path, tmp_path: Path, case: str, number: int
) -> None:
    """The errno is that of libc, no descriptor is left, and nothing is told."""
    path = tmp_path / "it"
    plain = tmp_path / "plain"
    shutil.copy(static, plain)
    plain.chmod(0o644)
    if case == "not executable":
        path = plain
    elif case == "script not executable":
        script(path, static).chmod(0o644)
    elif case == "interpreter not executable":
        script(path, plain)
    elif case == "no program":
        path.write_bytes(b"\x7fELF")
        path.chmod(0o755)
    elif case == "its own interpreter":
        script(path, path)
    # execvp(3) has no answer to NULL, and gives a file of no known format to the shell.
    functions = ["execve", "execv", "bare", "posix_spawn"]
    if number in (errno.ENOENT, errno.EACCES):
        functions += ["execvp", "posix_spawnp"]
    for function in functions:
        command = [program("starter"), "exec", function, *([path] if case != "NULL" else [])]
        done = run(environment, *command)
        assert (done.stdout, done.stderr) == (f"errno {number}, 0 descriptors more\n", "")
        assert run(without_library(environment), *command).stdout == done.stdout


def test_a_fifo_is_not_opened(environment: dict[str, str], tmp_path: Path) -> None:
    """Opening it would set a writer free who waits for a reader."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o755)
    with subprocess.Popen(
        ["sh", "-c", 'echo ready; exec 3>"$1"; echo opened', "sh", fifo], stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout
        assert writer.stdout.readline() == b"ready\n"
        run(environment, program("starter"), "vfork", "execve", fifo)
        writer.kill()
        assert writer.stdout.read() == b""


@pytest.mark.parametrize(
    ("variables", "tells"),
    [
        ({"FLOCKSHIM_MODE": "success"}, True),
        ({"FLOCKSHIM_MODE": "cluster"}, True),
        ({"FLOCKSHIM_MODE": "fail"}, False),
        ({"FLOCKSHIM_MODE": "fail", "FLOCKSHIM_SIMULATE": "38"}, True),
        ({"FLOCKSHIM_QUIET": "1"}, False),
        ({"FLOCKSHIM_QUIET": "0"}, True),
        ({"FLOCKSHIM_SUPERVISED": "1"}, False),
        ({"FLOCKSHIM_VIA": "seccomp"}, True),
        ({"FLOCKSHIM_RUN": ""}, False),
        ({"FLOCKSHIM_RUN": "/../up"}, False),
        ({"FLOCKSHIM_RUN": "name"}, False),
    ],
)
def test_who_wants_to_be_told(
    environment: dict[str, str], static: Path, variables: dict[str, str], tells: bool
) -> None:
    expected = line(static, STATIC) if tells else ""
    assert told({**environment, **variables}, "sh", "-c", f"env -i {static}") == expected
    if "FLOCKSHIM_RUN" not in variables:  # set for the child alone
        words = [f"{name}={value}" for name, value in variables.items()]
        environment["FLOCKSHIM_RUN"] = "2"
        assert told(environment, "env", *words, static) == expected


# Once


def test_a_thousand_tell_once(environment: dict[str, str], static: Path, rendezvous: Path) -> None:
    command = f"for i in 1 2 3 4 5 6 7 8 9 10; do (for j in $(seq 100); do {static} & done; wait) & done; wait"
    done = run(environment, "bash", "-c", command)
    assert done.stdout == "ran\n" * 1000
    assert done.stderr == line(static, STATIC)
    assert markers(rendezvous) == [f"told-{environment['FLOCKSHIM_RUN']}"]
    assert (rendezvous / markers(rendezvous)[0]).stat().st_mode & 0o7777 == 0o600


def test_once_in_each_run(environment: dict[str, str], static: Path, rendezvous: Path) -> None:
    for expected in (line(static, STATIC), ""):
        assert told(environment, "sh", "-c", f"{static}") == expected
    assert told(shim_environment(rendezvous), "sh", "-c", f"{static}") == line(static, STATIC)


def test_a_run_inside_a_run_is_part_of_it(environment: dict[str, str], static: Path) -> None:
    flockshim = f"{sys.executable} -m flockshim"
    assert told(environment, "sh", "-c", f"{flockshim} sh -c {static}; {static}") == line(static, STATIC)
    del environment["FLOCKSHIM_RUN"]
    command = f"{flockshim} sh -c {static}; {flockshim} sh -c {static}"
    assert told(environment, "sh", "-c", command) == 2 * line(static, STATIC)


def test_the_directory_is_made(environment: dict[str, str], static: Path, rendezvous: Path) -> None:
    rendezvous.rmdir()
    assert told(environment, "sh", "-c", f"{static}") == line(static, STATIC)
    assert rendezvous.stat().st_mode & 0o7777 == 0o700


def test_nothing_is_told_where_that_cannot_be_noted(
    environment: dict[str, str], static: Path, rendezvous: Path, tmp_path: Path
) -> None:
    rendezvous.chmod(0o750)
    assert told(environment, "sh", "-c", f"{static}") == ""
    assert markers(rendezvous) == []
    rendezvous.chmod(0o700)
    link = tmp_path / "link"
    link.symlink_to(rendezvous)
    for directory in (link, static, tmp_path / "no/such", "/x" * 100):
        assert told({**environment, "FLOCKSHIM_DIR": str(directory)}, "sh", "-c", f"{static}") == ""
    (rendezvous / f"told-{environment['FLOCKSHIM_RUN']}").symlink_to(tmp_path / "elsewhere")
    assert told(environment, "sh", "-c", f"{static}") == ""
    assert not (tmp_path / "elsewhere").exists()


def test_who_tells_removes_what_is_older_than_a_day(
    environment: dict[str, str], static: Path, rendezvous: Path
) -> None:
    now = time.time()
    ages = {"told-older": DAY + 600, "told-younger": DAY - 600, "other": 9 * DAY}
    ages.update({f"told-{i}": 2 * DAY for i in range(100)})
    for name, age in ages.items():
        (rendezvous / name).touch()
        os.utime(rendezvous / name, (now, now - age))
    assert told(environment, "sh", "-c", f"{static}") == line(static, STATIC)
    assert sorted(os.listdir(rendezvous)) == sorted(["other", "told-younger", f"told-{environment['FLOCKSHIM_RUN']}"])


def test_a_keeper_that_leaves_removes_what_is_older_than_a_day(rendezvous: Path, nolock_dir: Path) -> None:
    for name, age in (("told-older", DAY + 600), ("told-younger", DAY - 600)):
        (rendezvous / name).touch()
        os.utime(rendezvous / name, (time.time(), time.time() - age))
    fleet = Fleet(shim_environment(rendezvous, FLOCKSHIM_IDLE="0.2"))
    try:
        driver = fleet.start()
        fd = driver.open(nolock_dir / "file")
        assert driver.flock(fd, EX) == OK
        (keeper,) = keepers(rendezvous)
        assert driver.flock(fd, UN) == OK
        await_end(keeper.standby)
    finally:
        fleet.end()
    assert markers(rendezvous) == ["told-younger"]


# Standard error


def test_a_line_that_nobody_would_read_is_said_later(environment: dict[str, str], static: Path, tmp_path: Path) -> None:
    unread = f"{static} 2>/dev/null; {static} 2>&-; {static} 2>{tmp_path}/file"
    assert told(environment, "sh", "-c", f"{unread}; {static}") == line(static, STATIC)
    assert (tmp_path / "file").read_text() == ""


def test_a_pipe_that_is_full_or_without_a_reader(environment: dict[str, str], static: Path) -> None:
    """Who would read it may be waiting for the very program that is started."""
    for full in (True, False):
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        with pytest.raises(BlockingIOError):
            while full:
                os.write(writer, bytes(65536))
            raise BlockingIOError
        os.set_blocking(writer, True)
        if not full:
            os.close(reader)
        starter = [program("starter"), "vfork", "execve", static]
        done = subprocess.run(starter, env=environment, stderr=writer, stdout=subprocess.PIPE, timeout=60, check=True)
        assert done.stdout == b"ran\nerrno 0, 0 descriptors more\n"
        os.close(writer)
        if full:
            os.close(reader)
    assert told(environment, "sh", "-c", f"{static}") == line(static, STATIC)


def test_a_name_does_nothing_to_a_terminal(environment: dict[str, str], static: Path, tmp_path: Path) -> None:
    path = shutil.copy(static, tmp_path / "a\033[2Jb\n\x9b")
    said = run(environment, program("starter"), "exec", "execve", path).stderr
    assert said == line(f"{tmp_path}/a?[2Jb???", STATIC)


# Nothing else is changed


def test_the_same_calls_as_without(environment: dict[str, str], static: Path) -> None:
    require(shutil.which("strace"), "no strace", "apt install strace")
    python = f"{sys.executable} -c 'import os; os.system(\"{static}\")'"
    command = f"{static}; env -i {static}; nice -n 1 {static} a b; no-such-program; {python}"

    def calls(variables: dict[str, str]) -> list[str]:
        words = [f"{name}={value}" for name, value in variables.items()]
        strace = ["strace", "-f", "-qq", "-e", "trace=execve,execveat", "-e", "signal=none", "-o", "/dev/stdout"]
        # The shim is in the programs, not in strace.
        done = run({"PATH": environment["PATH"]}, *strace, "env", *words, "sh", "-c", command, status=None)
        lines = [each for each in done.stdout.splitlines() if "exec" in each]
        calls = [re.sub(r"0x\w+ /\* \d+ vars \*/", "ENVIRONMENT", each.split(" ", 1)[1].strip()) for each in lines]
        return calls[1:]  # that of env differs in its arguments

    plain = calls(without_library(environment))
    assert calls(environment) == plain
    assert len([each for each in plain if str(static) in each and each.endswith("= 0")]) >= 4


NEXT = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <unistd.h>
#define NEXT(name, parameters, words)                                                                                  \
    int name parameters {                                                                                              \
        int (*next) parameters = (int (*) parameters) dlsym(RTLD_NEXT, #name);                                         \
        write(1, #name " ", sizeof #name);                                                                             \
        return next words;                                                                                             \
    }
NEXT(execve, (const char *f, char *const a[], char *const e[]), (f, a, e))
NEXT(execv, (const char *f, char *const a[]), (f, a))
NEXT(execvp, (const char *f, char *const a[]), (f, a))
#define SPAWN (pid_t *p, const char *f, const void *x, const void *y, char *const a[], char *const e[])
NEXT(posix_spawn, SPAWN, (p, f, x, y, a, e))
NEXT(posix_spawnp, SPAWN, (p, f, x, y, a, e))
"""


@pytest.mark.parametrize("compiler", ["cc", "musl-gcc"])
@pytest.mark.parametrize("function", ["execve", "execv", "execvp", "posix_spawn", "posix_spawnp"])
def test_another_library_that_has_these_functions(
    environment: dict[str, str], static: Path, tmp_path: Path, compiler: str, function: str
) -> None:
    """Such as fakechroot(1): it is called as it would be without ours."""
    require(shutil.which(compiler), f"no {compiler}", "apt install gcc libc6-dev musl-tools")
    (tmp_path / "next.c").write_text(NEXT)
    library = tmp_path / "next.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", library, tmp_path / "next.c"], check=True)
    environment["LD_PRELOAD"] += f":{library}"
    done = run(environment, program("starter", compiler), "exec", function, static)
    assert (done.stdout.splitlines()[0], done.stderr) == (f"{function} ran", line(static, STATIC))


EARLY = r"""
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>
extern char **environ;
int early_status = -1;
__attribute__((constructor)) static void early(void) {
    char *arguments[] = {"/bin/true", NULL};
    pid_t child;
    if (posix_spawn(&child, *arguments, NULL, NULL, arguments, environ) || waitpid(child, &early_status, 0) < 0)
        _exit(99);
    if ((child = vfork()) == 0) {
        execvp("true", arguments);
        _exit(98);
    }
    waitpid(child, &early_status, 0);
    if (early_status)
        _exit(97);
}
"""


@pytest.mark.parametrize("compiler", ["cc", "musl-gcc"])
def test_a_library_that_starts_programs_before_ours_is_ready(
    environment: dict[str, str], tmp_path: Path, compiler: str
) -> None:
    require(shutil.which(compiler), f"no {compiler}", "apt install gcc libc6-dev musl-tools")
    (tmp_path / "early.c").write_text(EARLY)
    (tmp_path / "main.c").write_text("extern int early_status; int main(void) { return early_status; }\n")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / "early.so", tmp_path / "early.c"], check=True)
    words = ["-o", tmp_path / "main", tmp_path / "main.c", tmp_path / "early.so"]
    subprocess.run([compiler, *words], check=True)
    assert told(environment, tmp_path / "main") == ""
