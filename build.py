"""Builds the native side with cffi: the extension `flockshim._native` and the library to preload.

Run it as a command to build both in place, for work in a checkout: ``python build.py``. Installation (``pip
install .``) does the same through setup.py.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import cffi
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = os.path.dirname(os.path.abspath(__file__))
LIBRARY = "flockshim.libflockshim"

CLIENT_SOURCES = ["lock", "record", "client", "channel", "shared", "start", "rendezvous", "report", "config", "text"]
SHIM_SOURCES = ["flock", "fcntl", "exec", "next", "reach", "told", *CLIENT_SOURCES, "memory"]
NATIVE_SOURCES = [
    *CLIENT_SOURCES,
    "requests",
    "listing",
    "recordproxy",
    "process",
    "descriptions",
    "search",
    "inflight",
    "processes",
    "probes",
    "filter",
    "target",
    "supervise",
    "supervised_kernel",
    "supervised_wait",
    "supervised_record",
]

STRICT = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"]
# No libc: one file for glibc of any age and for musl. The compiler must not call it behind our back either.
FREESTANDING = [
    "-O2",
    "-ffreestanding",
    "-fno-builtin",
    "-fno-stack-protector",
    "-fno-tree-loop-distribute-patterns",
    "-U_FORTIFY_SOURCE",
]
LINK = [
    "-nostdlib",
    "-Wl,--version-script=shim/export.map",
    "-Wl,--hash-style=both",
    "-Wl,-z,now",
    "-Wl,-z,relro",
    "-Wl,-z,noexecstack",
]

CDEF = """
    struct protocol_request {
        uint32_t magic;
        uint16_t version;
        uint16_t kind;
        int32_t operation;
        int32_t descriptor;
        uint64_t device;
        uint64_t inode;
        uint32_t flags;
        int32_t timeout;
        int32_t pid;
        int32_t family;
        int64_t first, last;
        ...;
    };
    struct native_packet {
        int connection;
        int pid;
        int descriptor;
        int status;
        struct protocol_request request;
    };
    struct native_suspect {
        int kept;
        uint64_t device, inode;
        int known_pid;
        int pid;
        int number;
        ...;
    };
    struct config {
        const char *bad;
        ...;
    };
    struct rendezvous {
        char directory[...];
        ...;
    };
    struct client_wait {
        int timeout;
        int poll;
        int cancel;
        int timed_out;
        char refusal[...];
    };
    #define PROTOCOL_VERSION ...
    #define STATUS_LOCK ...
    #define STATUS_LIST ...
    #define STATUS_KNOCK ...
    #define STATUS_CANCEL ...
    #define STATUS_TAKEN ...
    #define STATUS_NOTHING ...
    #define STATUS_ENDED ...
    #define STATUS_VERSION ...
    #define STATUS_FULL ...
    #define KIND_ANSWER ...
    #define KIND_REFUSAL ...
    #define KIND_REDIRECT ...
    #define KIND_WAITING ...
    #define KIND_GRANT ...
    #define KIND_TIMEOUT ...
    #define KIND_KNOCK ...
    #define KIND_FOUND ...
    #define FLAG_STAY ...
    #define FLAG_REDIRECTED ...
    #define PROTOCOL_MAGIC ...
    #define FAMILY_FLOCK ...
    #define FAMILY_PROCESS ...
    #define LOCK_TEST ...
    #define RECORD_END ...
    #define PING_ERROR_OF_SUCCESS ...
    #define FLAG_TELL ...
    #define FLAG_CLUSTER ...
    #define FLAG_ONLY_WARN ...

    void config_read(struct config *config, char **environment);
    int rendezvous_find(const struct config *config, struct rendezvous *rendezvous);
    int config_triggers(const struct config *config, int error);
    int is_for_all_hosts(const struct config *config, int descriptor);
    int lock_by_kernel(const struct config *config, int descriptor, int operation);
    int flock_by_mode(const struct config *config, struct client_wait *wait, int descriptor, int operation,
                      int kernel_error);

    void native_accept(int listener, struct native_packet *packet);
    void native_receive(int connection, struct native_packet *packet);
    void native_stop_receiving(int connection);
    void native_send(int connection, int kind, int error, const char *text);
    void native_answer(int connection, int kind, int error, const char *text);
    int native_ask_for_list(const char *socket_path, int descriptor, int milliseconds);
    void native_send_found(int connection, int exclusive, int pid, int64_t first, int64_t last, const char *holder);
    int native_try_lock(int descriptor, int exclusive);
    struct native_range {
        int64_t first, last;
        int exclusive;
    };
    int native_lock_record(int descriptor, int operation, int64_t first, int64_t last);
    int native_test_record(int descriptor, int operation, struct native_range *range);
    int native_was_closed_at(int kept, int pid, int number);
    int native_same_description(int one, int other);
    int native_compare(int one, int other, int *error);
    int native_is_open_in(int kept, int pid);
    void native_close(int descriptor);
    int native_is_open_at(int kept, int pid, int number);
    int native_find_open(struct native_suspect *suspects, int count);
    int native_clone_sharing_descriptors(void);
    int native_self(void);
    int native_die_with_parent(int signal);
    int native_pidfd_open(int pid);
    int native_pidfd_getfd(int pid, int number);
    int native_become_subreaper(void);
    int native_inotify_init(void);
    int native_inotify_add_watch(int inotify, const char *path, uint32_t mask);
    int native_inotify_rm_watch(int inotify, int watch);
    int native_report_lock_calls(void);
    int native_answer_lock_calls(int error);
    int native_ping_supervisor(void);
    int native_supervise(const struct config *config, int listener, int mark);
    int native_raw_flock(int descriptor, int operation);
    int native_raw_record_lock(int descriptor, int type, int of_description, int wait);
"""


def sources(names: list[str]) -> list[str]:
    """Return the C files of these names, relative to the project as setuptools wants them."""
    return [f"shim/{name}.c" for name in names]


native = cffi.FFI()
native.cdef(CDEF)
native.set_source(
    "flockshim._native",
    '#include "native.h"',
    sources=sources(NATIVE_SOURCES),
    include_dirs=["shim"],
    extra_compile_args=["-D_GNU_SOURCE", "-fvisibility=hidden", "-pthread"],
    extra_link_args=["-pthread"],
)


class BuildNative(build_ext):
    """Builds the preload library as what it is: no Python extension, under its own file name."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the file name of an extension: ours has no Python tag in it."""
        if fullname.endswith("libflockshim"):
            return os.path.join(*fullname.split(".")) + ".so"
        return str(super().get_ext_filename(fullname))  # type: ignore[no-untyped-call]

    def build_extension(self, ext: Any) -> None:
        """Build the preload library by compiler and linker alone, without Python's own flags and libraries."""
        if ext.name != LIBRARY:
            super().build_extension(ext)
            return
        target = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        compiler = os.environ.get("CC", "cc").split()
        flags = [*STRICT, *FREESTANDING, "-fPIC", "-shared", *LINK]
        self.spawn([*compiler, *flags, "-o", target, *ext.sources])


def main() -> None:
    """Build what ``setup.py`` is asked for."""
    setup(
        cffi_modules=["build.py:native"],
        ext_modules=[Extension(LIBRARY, sources(SHIM_SOURCES))],
        cmdclass={"build_ext": BuildNative},
    )


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.argv[1:] = ["build_ext", "--inplace", *sys.argv[1:]]
    main()
