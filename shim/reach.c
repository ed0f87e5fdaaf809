#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <sys/stat.h>
#include <unistd.h>

#include "reach.h"
#include "syscalls.h"
#include "text.h"

#if defined(__x86_64__)
#define OUR_MACHINE EM_X86_64
#else
#define OUR_MACHINE EM_AARCH64
#endif

/* fs/exec.c: a script's interpreter may itself be a script, this often in all. */
#define MAX_SCRIPTS 5

/* Nearly every program's headers and notes; the stack may be small, that of a signal handler say.
 */
#define HEAD_SIZE 1024

/* Against files that are made to take long; real programs have a tenth of that. */
#define MAX_ENTRIES 256

#define GO_NOTE_TYPE 4

static const char without_preload[] = "is started without LD_PRELOAD";

struct file {
    int descriptor;
    size_t length; /* of the head */
    char head[HEAD_SIZE];
};

static int get(const struct file *file, uint64_t offset, void *to, size_t size) {
    if (offset > file->length || size > file->length - offset)
        return sys4(SYS_pread64, file->descriptor, to, size, offset) == (long)size;
    for (size_t i = 0; i < size; i++)
        ((char *)to)[i] = file->head[offset + i];
    return 1;
}

static uint64_t padded(uint64_t size, uint64_t alignment) {
    return (size + alignment - 1) & ~(alignment - 1);
}

/* Go's linker writes a note of its own into every program (unless told otherwise: -buildid=). */
static int is_go_note(const struct file *file, const Elf64_Phdr *segment) {
    const uint64_t alignment = segment->p_align == 8 ? 8 : 4;
    uint64_t at = 0;

    for (int i = 0; i < MAX_ENTRIES; i++) {
        struct {
            Elf64_Nhdr header;
            char owner[4];
        } note;

        if (at + sizeof note > segment->p_filesz ||
            !get(file, segment->p_offset + at, &note, sizeof note))
            return 0;
        if (note.header.n_type == GO_NOTE_TYPE && note.header.n_namesz == sizeof note.owner &&
            text_equal(note.owner, "Go"))
            return 1;
        at = padded(at + sizeof note.header + note.header.n_namesz, alignment);
        at = padded(at + note.header.n_descsz, alignment);
    }
    return 0;
}

/* The dynamic linker itself has no interpreter either, nor is it a program by its flags; it can be
 * run with another program's name, and heeds LD_PRELOAD then. */
static int is_marked_as_program(const struct file *file, const Elf64_Phdr *segment) {
    for (uint64_t i = 0; i < MAX_ENTRIES; i++) {
        Elf64_Dyn entry;

        if (!get(file, segment->p_offset + i * sizeof entry, &entry, sizeof entry) ||
            entry.d_tag == DT_NULL)
            return 0;
        if (entry.d_tag == DT_FLAGS_1)
            return (entry.d_un.d_val & DF_1_PIE) != 0;
    }
    return 0;
}

/* What keeps the library out of the program, or NULL. */
static const char *look_into(const struct file *file, int preloads) {
    Elf64_Phdr dynamic = {0};
    Elf64_Ehdr header;
    int has_interpreter = 0;

    if (!get(file, 0, &header, sizeof header))
        return NULL;
    if (header.e_ident[EI_CLASS] == ELFCLASS32)
        return "is a 32-bit program";
    if (header.e_ident[EI_DATA] != ELFDATA2LSB || header.e_machine != OUR_MACHINE)
        return "is built for another kind of machine";
    if (header.e_phentsize != sizeof(Elf64_Phdr))
        return NULL;
    for (uint64_t i = 0; i < header.e_phnum && i < MAX_ENTRIES; i++) {
        Elf64_Phdr segment;

        if (!get(file, header.e_phoff + i * sizeof segment, &segment, sizeof segment))
            return NULL;
        if (segment.p_type == PT_NOTE && is_go_note(file, &segment))
            return "is a Go program";
        if (segment.p_type == PT_INTERP)
            has_interpreter = 1;
        else if (segment.p_type == PT_DYNAMIC)
            dynamic = segment;
    }
    if (has_interpreter)
        return preloads ? NULL : without_preload;
    if (header.e_type == ET_DYN && !is_marked_as_program(file, &dynamic))
        return NULL;
    return "is statically linked";
}

/* As fs/binfmt_script.c finds it; NULL where there is none, or where its name is cut off. */
static const char *find_interpreter(const struct file *file, char *name) {
    const size_t most = file->length < REACH_LINE_SIZE ? file->length : REACH_LINE_SIZE;
    size_t begin = 2, end;

    while (begin < most && (file->head[begin] == ' ' || file->head[begin] == '\t'))
        begin++;
    for (end = begin; end < most && file->head[end]; end++) {
        if (file->head[end] == ' ' || file->head[end] == '\t' || file->head[end] == '\n')
            break;
        name[end - begin] = file->head[end];
    }
    if (end == begin || end == REACH_LINE_SIZE)
        return NULL;
    name[end - begin] = 0;
    return name;
}

/* Nothing else may be opened: that alone makes a difference to a FIFO, or to a tape. */
static int is_regular_file(const char *path, struct stat *status) {
    return sys4(SYS_newfstatat, AT_FDCWD, path, status, 0) == 0 && S_ISREG(status->st_mode);
}

/* capabilities(7), and inode(7): without the execute bit set-gid is no privilege. */
static int gives_privileges(const char *path, const struct stat *status) {
    return (status->st_mode & S_ISUID) ||
           (status->st_mode & (S_ISGID | S_IXGRP)) == (S_ISGID | S_IXGRP) ||
           sys4(SYS_getxattr, path, "security.capability", NULL, 0) > 0;
}

static int may_execute(const char *path) {
    return sys3(SYS_faccessat, AT_FDCWD, path, X_OK) == 0;
}

/* Goes on from reach->program: to the interpreter, if it is a script, whose name is returned then.
 */
static const char *look_at_program(struct reach *reach, int preloads) {
    struct stat status;
    struct file file;
    const char *next = NULL;
    long length;

    if (!is_regular_file(reach->program, &status))
        return NULL;
    file.descriptor = (int)sys4(SYS_openat, AT_FDCWD, reach->program,
                                O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, 0);
    if (file.descriptor < 0)
        return NULL;
    length = sys4(SYS_pread64, file.descriptor, file.head, sizeof file.head, 0);
    file.length = length > 0 ? (size_t)length : 0;
    if (file.length > SELFMAG && text_after(file.head, ELFMAG))
        reach->why = look_into(&file, preloads);
    else if (file.length > 2 && text_after(file.head, "#!"))
        next = find_interpreter(&file, reach->interpreter);
    sys1(SYS_close, file.descriptor);
    if (reach->why && (gives_privileges(reach->program, &status) || !may_execute(reach->program)))
        reach->why = NULL;
    return next;
}

int reach_is_out_of(struct reach *reach, const char *path, int preloads) {
    reach->program = path;
    reach->why = NULL;
    for (int scripts = 0; scripts <= MAX_SCRIPTS; scripts++) {
        const char *interpreter = look_at_program(reach, preloads);

        if (!interpreter)
            break;
        reach->program = interpreter;
    }
    /* What the user did not ask for by name need not be named, if any program would do. */
    if (reach->why == without_preload)
        reach->program = path;
    return reach->why && may_execute(path);
}

int reach_is_program(const char *path) {
    struct stat status;

    return is_regular_file(path, &status) && may_execute(path);
}
