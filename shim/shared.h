/* Which file systems other hosts may have mounted too. */
#ifndef FLOCKSHIM_SHARED_H
#define FLOCKSHIM_SHARED_H

int is_shared_file_system(int descriptor);

#endif
