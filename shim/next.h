/* The functions that a program would call if our library were not there: those of libc, or of
 * another preloaded library, such as fakechroot's. */
#ifndef FLOCKSHIM_NEXT_H
#define FLOCKSHIM_NEXT_H

enum next {
    NEXT_EXECVE,
    NEXT_EXECV,
    NEXT_EXECVP,
    NEXT_POSIX_SPAWN,
    NEXT_POSIX_SPAWNP,
    NEXT_FCNTL,
    NEXT_FCNTL64,
    NEXT_RECV,
    NEXT_COUNT
};

/* NULL where there is none. */
void *next_function(enum next which);

#endif
