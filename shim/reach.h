/* Whether a program that is about to be executed will have the library in it. */
#ifndef FLOCKSHIM_REACH_H
#define FLOCKSHIM_REACH_H

/* linux/binfmts.h: how much of a script's first line the kernel looks at. */
#define REACH_LINE_SIZE 256

struct reach {
    const char *program; /* the path that was asked about, or that of the script's interpreter */
    const char *why;     /* what keeps the library out of it: "is statically linked" */
    char interpreter[REACH_LINE_SIZE];
};

/* Whether the program will run without the library; false, too, for what is set-uid or the like,
 * which nothing of ours can cover, and for what cannot be executed or not be read. `preloads` says
 * whether the dynamic linker will be asked for the library. */
int reach_is_out_of(struct reach *reach, const char *path, int preloads);

/* Whether execve(2) would take the file, as far as its permissions go. */
int reach_is_program(const char *path);

#endif
