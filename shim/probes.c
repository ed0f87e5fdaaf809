/* Lock calls for flockshim --check: by number, since what the kernel says is asked, also where the
 * shim is preloaded into this process and has taken the C library's flock. */
#include <errno.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "native.h"

_Static_assert(sizeof(off_t) == 8, "struct flock must be the one that SYS_fcntl takes");

int native_raw_flock(int descriptor, int operation) {
    return syscall(SYS_flock, descriptor, operation) < 0 ? -errno : 0;
}

int native_raw_record_lock(int descriptor, int type, int of_description, int wait) {
    /* l_pid must be 0 for the locks of descriptions (fcntl(2)). */
    struct flock lock = {.l_type = (short)type, .l_whence = SEEK_SET};
    int command = wait ? F_SETLKW : F_SETLK;

    if (of_description)
        command = wait ? F_OFD_SETLKW : F_OFD_SETLK;
    return syscall(SYS_fcntl, descriptor, command, &lock) < 0 ? -errno : 0;
}
