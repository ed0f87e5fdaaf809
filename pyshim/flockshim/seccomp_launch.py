"""Starts COMMAND behind a seccomp filter: with a supervisor, or with none where the answer is always the same."""

from __future__ import annotations

from flockshim import FlockshimError, elf, launch, supervisor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import NoReturn

    from flockshim.parent import Child

NESTED = "FLOCKSHIM_SUPERVISED"
"""A variable that tells a flockshim inside that it should look whether it is supervised already."""


class Way:
    """How COMMAND is started: `start` turns a process into it, which `begin` makes; where that is None, this one."""

    def __init__(
        self,
        command: tuple[str, list[str]],
        environ: Mapping[str, str],
        become: Callable[[str, list[str], Mapping[str, str]], int],
        say: Callable[[str], None],
        unreachable: elf.UnreachableError | None,
    ) -> None:
        """Choose.

        :param command: its path and arguments.
        :param environ: the settings.
        :param become: does ``execve(2)``; returns an exit status where that fails.
        :param say: writes a line to standard error.
        :param unreachable: why the preload library does not do; None where the user asked for the filter.
        """
        self._path, self._arguments = command
        self._environ = environ
        self._become = become
        self._say = say
        self._unreachable = unreachable
        self._answer = _constant_answer(environ)
        needs_supervisor = self._answer is None and not supervisor.is_supervised(environ)
        self.begin = self._supervised if needs_supervisor else None

    def start(self) -> int:
        """Become COMMAND; see `parent.run`."""
        if self._answer is not None:
            try:
                supervisor.confine_and_answer(self._answer)
            except supervisor.RefusedError as refused:
                self._say(self._refusal(refused))
                return 125
        if elf.why_privileged(self._path) and "FLOCKSHIM_QUIET" not in self._environ and _has_no_new_privileges():
            self._say(
                f"warning: {self._path!r} is set-uid, set-gid or has file capabilities, which no filter leaves it "
                "(no_new_privs): start flockshim behind it, not before it"
            )
        # A flockshim inside is to find its own way.
        environ = {**launch.without_shim(self._environ), NESTED: "1"}
        environ.pop("FLOCKSHIM_VIA", None)
        return self._become(self._path, self._arguments, environ)

    def _supervised(self, become: Callable[[], NoReturn]) -> Child:
        try:
            return supervisor.SupervisedChild(self._environ, become, self._say)
        except supervisor.RefusedError as refused:
            raise FlockshimError(self._refusal(refused)) from None

    def _refusal(self, refused: supervisor.RefusedError) -> str:
        if self._unreachable:
            why, advice = self._unreachable.why, self._unreachable.advice
            return f"{why}, so the lock shim cannot work in it, and it cannot be supervised: {refused}: {advice}"
        return f"COMMAND cannot be supervised: {refused}: use --via preload, which covers dynamically linked programs"


def refuse_other_supervisor(environ: Mapping[str, str]) -> None:
    """Raise FlockshimError where the shim would ask not the kernel but an outer flockshim that has other settings."""
    asks_kernel = not environ.get("FLOCKSHIM_FORCE") and "FLOCKSHIM_SIMULATE" not in environ
    if asks_kernel and supervisor.is_supervised(environ) is False:
        raise FlockshimError(
            "an outer flockshim --via seccomp with other settings answers all lock calls here: give both the same"
        )


def _constant_answer(environ: Mapping[str, str]) -> int | None:
    """Return the errno, or 0, that every lock call ends with; None where that depends on the call."""
    number, _, directory = environ.get("FLOCKSHIM_SIMULATE", "").partition(":")
    mode = environ["FLOCKSHIM_MODE"]
    if directory:
        return None
    if mode == "success":
        return 0
    return int(number) if mode == "fail" and number else None


def _has_no_new_privileges() -> bool:
    with open("/proc/self/status") as file:
        return any(line.split() == ["NoNewPrivs:", "1"] for line in file)
