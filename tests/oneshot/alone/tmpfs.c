/* A tmpfs of its own: files, links, modes and owners, what was deleted and is open, a limit. */
#include "../oneshot.h"
#include <sched.h>
#include <sys/mount.h>
#include <sys/statvfs.h>
static char base[PATH_MAX];
static const char *at(const char *name) {
    static char path[PATH_MAX + 64];
    snprintf(path, sizeof path, "%s/%s", base, name);
    return path;
}
static void is(const char *name, mode_t mode, uid_t uid, gid_t gid) {
    struct stat s;
    CHECK(lstat(at(name), &s) == 0);
    if (s.st_mode != mode || s.st_uid != uid || s.st_gid != gid)
        FAIL("%s: %o %d %d", name, s.st_mode, s.st_uid, s.st_gid);
}
int main(int argc, char **argv) {
    begin(argc, argv);
    snprintf(base, sizeof base, "%s.tmpfs", outfile);
    mkdir(base, 0700);
    struct stat outer, now_outer, dev;
    CHECK(stat(base, &outer) == 0 && unshare(CLONE_NEWNS) == 0);
    CHECK(mount(0, "/", 0, MS_REC | MS_PRIVATE, 0) == 0);
    CHECK(mount("own", base, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "size=1024k,nr_inodes=100") == 0);
    CHECK(chmod(base, 01750) == 0 && chown(base, 12, 34) == 0 && stat(base, &dev) == 0);
    CHECK(dev.st_dev != outer.st_dev);
    char text[16], big[70000];
    memset(big, 'x', sizeof big);
    CHECK(mkdir(at("dir"), 0711) == 0 && mkdir(at("dir/empty"), 0700) == 0);
    int file = open(at("dir/file"), O_RDWR | O_CREAT, 0640);
    put(file, "in a file", 9);
    CHECK(fchown(file, 56, 78) == 0 && lseek(file, 3, SEEK_SET) == 3);
    int large = open(at("large"), O_RDWR | O_CREAT, 0600);
    put(large, big, sizeof big);
    CHECK(ftruncate(large, 300000) == 0 && close(large) == 0);
    CHECK(symlink("dir/file", at("link")) == 0 && mkfifo(at("fifo"), 0604) == 0);
    CHECK(chmod(at("fifo"), 0604) == 0);
    int gone = open(at("gone"), O_RDWR | O_CREAT, 0600);
    put(gone, "no name", 7);
    CHECK(unlink(at("gone")) == 0);
    ready();
    wait_for_term();
    is("", S_IFDIR | 01750, 12, 34);
    is("dir", S_IFDIR | 0711, 0, 0);
    is("dir/empty", S_IFDIR | 0700, 0, 0);
    is("dir/file", S_IFREG | 0640, 56, 78);
    is("large", S_IFREG | 0600, 0, 0);
    is("fifo", S_IFIFO | 0604, 0, 0);
    get(file, text, 6);
    CHECK(!memcmp(text, "a file", 6) && pwrite(file, "IN", 2, 0) == 2);
    int again = open(at("link"), O_RDONLY);
    CHECK(again >= 0);
    get(again, text, 9);
    CHECK(!memcmp(text, "IN a file", 9));
    large = open(at("large"), O_RDONLY);
    CHECK(read(large, big, sizeof big) == sizeof big && big[0] == 'x' && big[69999] == 'x');
    struct stat s;
    CHECK(fstat(large, &s) == 0 && s.st_size == 300000);
    CHECK(pread(gone, text, 16, 0) == 7 && !memcmp(text, "no name", 7));
    CHECK(fstat(gone, &s) == 0 && s.st_nlink == 0 && access(at("gone"), F_OK) == -1);
    struct statvfs vfs;
    CHECK(statvfs(base, &vfs) == 0 && vfs.f_blocks * vfs.f_frsize == 1024 << 10 && vfs.f_files == 100);
    CHECK((vfs.f_flag & (ST_NOSUID | ST_NODEV | ST_NOEXEC)) == (ST_NOSUID | ST_NODEV | ST_NOEXEC));
    /* It is of this tree alone: under it is what was there. */
    CHECK(umount2(base, MNT_DETACH) == 0 && stat(base, &now_outer) == 0);
    CHECK(now_outer.st_dev == outer.st_dev && now_outer.st_ino == outer.st_ino);
    verdict("PASS");
}
