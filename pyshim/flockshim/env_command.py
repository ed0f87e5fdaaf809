"""Reads an ``env`` command line to see which program it starts, and whether LD_PRELOAD reaches it.

``#!/usr/bin/env PROGRAM`` is how most scripts name their interpreter, so the check of a program
must not end at env. What cannot be read exactly is refused, never guessed.
"""

from flockshim.elf import UnreachableError

# Options of env(1) in coreutils and BusyBox. An argument that has to follow is marked by "=".
LONG = {
    "ignore-environment": "i",
    "null": "0",
    "unset": "u=",
    "chdir": "C=",
    "split-string": "S=",
    "argv0": "a=",
    "debug": "v",
    "block-signal": "",
    "default-signal": "",
    "ignore-signal": "",
    "list-signal-handling": "",
    "help": "",
    "version": "",
}
WITH_ARGUMENT = "uCSa"
HARMLESS = "0v"

# What env -S gives a meaning of its own.
SPLIT_SPECIAL = "\\'\"$#"

# Takes the place of words that cannot be read; cannot occur in an argument.
UNREADABLE = "\0"


def read(words: "list[str]", path: "str | None") -> "tuple[list[str], str | None, str]":
    """Return the command that ``env WORDS`` starts, the ``PATH`` to search, and its directory.

    :param path: ``PATH`` as env finds it, ``None`` if unset.
    :returns: the command is empty when env starts none; the directory is ``""`` without ``-C``.
    :raises UnreachableError: when env takes the shim away, or cannot be understood.
    """
    directory = ""
    words = list(words)
    while words and words[0].startswith("-"):
        word = words.pop(0)
        if word == "--":
            break
        for option, argument in _options(word, words):
            if option == "i":
                raise _refusal("-i clears the environment")
            if option == "u":
                path = _unset(argument, path)
            elif option == "C":
                directory = argument
            elif option == "S":
                words[:0] = _split(argument)
    while words and "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        if name == "LD_PRELOAD":
            raise _refusal("LD_PRELOAD is set anew")
        if name == "PATH":
            path = value
    if words and words[0] == UNREADABLE:
        raise _unreadable("-S with quotes or variables")
    return words, path, directory


def _options(word: str, words: "list[str]") -> "list[tuple[str, str]]":
    """Return the options in *word* with their arguments, taking these from *words* if need be."""
    if word == "-":
        return [("i", "")]
    if word.startswith("--"):
        name, equals, value = word[2:].partition("=")
        if name not in LONG:
            raise _unreadable(repr(word))
        option = LONG[name]
        if option.endswith("="):
            return [(option[0], value if equals else _next(words))]
        return [(option, "")]
    found: list[tuple[str, str]] = []
    for index, letter in enumerate(word[1:], 2):
        if letter in WITH_ARGUMENT:
            return [*found, (letter, word[index:] or _next(words))]
        if letter not in HARMLESS + "i":
            raise _unreadable(repr(word))
        found.append((letter, ""))
    return found


def _next(words: "list[str]") -> str:
    return words.pop(0) if words else ""


def _split(text: str) -> "list[str]":
    for separator in "\t\n\v\f\r":  # not what str.split() takes for white space
        text = text.replace(separator, " ")
    words: list[str] = []
    for word in filter(None, text.split(" ")):
        if any(character in SPLIT_SPECIAL for character in word):
            return [*words, UNREADABLE]
        words.append(word)
    return words


def _unset(name: str, path: "str | None") -> "str | None":
    if name == "LD_PRELOAD":
        raise _refusal("LD_PRELOAD is unset")
    return None if name == "PATH" else path


def _refusal(what: str) -> UnreachableError:
    return UnreachableError(f"env: {what}", "start flockshim behind env")


def _unreadable(what: str) -> UnreachableError:
    return UnreachableError(
        f"env: {what}: flockshim cannot tell which program this starts", "start flockshim behind env"
    )
