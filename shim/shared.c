#include <stddef.h>
#include <stdint.h>
#include <sys/vfs.h>

#include "shared.h"
#include "syscalls.h"

/* statfs(2), linux/magic.h, and the file systems' own sources. Whatever is not known to be of one
 * host alone may be shared: a lock that nobody needed costs less than one that was missing. */
static const uint32_t of_one_host[] = {
    0x0000ef53, /* ext2, ext3, ext4 */
    0x58465342, /* XFS */
    0x9123683e, /* Btrfs */
    0xca451a4e, /* bcachefs */
    0x2fc12fc1, /* ZFS */
    0xf2f52010, /* F2FS */
    0x3153464a, /* JFS */
    0x52654973, /* ReiserFS */
    0x00003434, /* NILFS */
    0x01021994, /* tmpfs */
    0x858458f6, /* ramfs */
    0x958458f6, /* hugetlbfs */
    0x794c7630, /* overlayfs */
    0x61756673, /* aufs */
    0x00004d44, /* FAT */
    0x2011bab0, /* exFAT */
    0x5346544e, /* NTFS */
    0x7366746e, /* NTFS3 */
    0x00004244, /* HFS */
    0x0000482b, /* HFS+ */
    0x15013346, /* UDF */
    0x00009660, /* ISO 9660 */
    0x73717368, /* SquashFS */
    0xe0f5e1e2, /* EROFS */
    0x000072b6, /* JFFS2 */
    0x24051905, /* UBIFS */
    0x0000137f, /* Minix */
};

int is_of_one_host(int descriptor) {
    struct statfs status;

    if (sys2(SYS_fstatfs, descriptor, &status) < 0)
        return 0;
    for (size_t i = 0; i < sizeof of_one_host / sizeof *of_one_host; i++) {
        if ((uint32_t)status.f_type == of_one_host[i])
            return 1;
    }
    return 0;
}

int is_for_all_hosts(const struct config *config, int descriptor) {
    return config->mode == MODE_CLUSTER ||
           (config->mode == MODE_AUTO && !is_of_one_host(descriptor));
}
