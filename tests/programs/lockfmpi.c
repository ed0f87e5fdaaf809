/*
 * MPI-IO as ROMIO does it on file systems it knows nothing of: atomic mode, and the file pointer
 * that all ranks share, are a matter of record locks. TURNS times each rank writes its number at
 * the shared pointer of LOG, and a block of its number at the start of BLOCKS.
 *
 *     mpirun -n 2 lockfmpi LOG BLOCKS TURNS
 */
#include <mpi.h>
#include <stdlib.h>

#define INTS 4096

static void check(int error) {
    if (error != MPI_SUCCESS)
        MPI_Abort(MPI_COMM_WORLD, 1);
}

static MPI_File opened(const char *path) {
    MPI_File file;
    check(
        MPI_File_open(MPI_COMM_WORLD, path, MPI_MODE_CREATE | MPI_MODE_RDWR, MPI_INFO_NULL, &file));
    check(MPI_File_set_atomicity(file, 1));
    return file;
}

/* Writes a block of its own number over that of the others, and reads a block of one number. */
static void exchange(MPI_File blocks, int rank) {
    static int block[INTS];
    for (int i = 0; i < INTS; i++)
        block[i] = rank;
    check(MPI_File_write_at(blocks, 0, block, INTS, MPI_INT, MPI_STATUS_IGNORE));
    check(MPI_File_read_at(blocks, 0, block, INTS, MPI_INT, MPI_STATUS_IGNORE));
    for (int i = 1; i < INTS; i++)
        if (block[i] != block[0])
            MPI_Abort(MPI_COMM_WORLD, 2);
}

int main(int argc, char **argv) {
    int rank;
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_File log = opened(argv[1]);
    MPI_File blocks = opened(argv[2]);
    for (int turn = 0; turn < atoi(argv[3]); turn++) {
        check(MPI_File_write_shared(log, &rank, 1, MPI_INT, MPI_STATUS_IGNORE));
        exchange(blocks, rank);
    }
    check(MPI_File_close(&log));
    check(MPI_File_close(&blocks));
    MPI_Finalize();
    return 0;
}
