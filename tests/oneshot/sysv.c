/* System V shared memory, semaphores and messages in the ipc namespace that it was started in. */
#include "oneshot.h"
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>
struct message {
    long kind;
    char text[32];
};
int main(int argc, char **argv) {
    begin(argc, argv);
    int segment = shmget(IPC_PRIVATE, 20000, IPC_CREAT | 0600), set = semget(IPC_PRIVATE, 3, 0600);
    int queue = msgget(IPC_PRIVATE, 0600), gone = shmget(IPC_PRIVATE, 5000, 0600);
    CHECK(segment >= 0 && set >= 0 && queue >= 0 && gone >= 0);
    char *memory = shmat(segment, 0, 0), *deleted = shmat(gone, 0, 0);
    CHECK(memory != (void *)-1 && deleted != (void *)-1 && shmctl(gone, IPC_RMID, 0) == 0);
    strcpy(memory + 9000, "in the segment");
    strcpy(deleted + 100, "in what was deleted");
    unsigned short values[3] = {5, 0, 7};
    CHECK(semctl(set, 0, SETALL, values) == 0);
    struct message one = {1, "the first"}, two = {2, "the second"}, found;
    CHECK(msgsnd(queue, &one, 32, 0) == 0 && msgsnd(queue, &two, 32, 0) == 0);
    pid_t child = fork();
    if (!child) {
        struct sembuf wait = {1, -2, 0};
        while (semop(set, &wait, 1) && errno == EINTR) {}
        strcpy(memory, "from the child");
        _exit(3);
    }
    ready();
    wait_for_term();
    CHECK(!strcmp(memory + 9000, "in the segment") && !strcmp(deleted + 100, "in what was deleted"));
    struct sembuf give = {1, 2, 0};
    int status;
    CHECK(waitpid(child, &status, WNOHANG) == 0 && semop(set, &give, 1) == 0);
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 3);
    CHECK(!strcmp(memory, "from the child"));
    CHECK(semctl(set, 0, GETALL, values) == 0 && values[0] == 5 && !values[1] && values[2] == 7);
    CHECK(msgrcv(queue, &found, 32, 2, IPC_NOWAIT) == 32 && !strcmp(found.text, "the second"));
    CHECK(msgrcv(queue, &found, 32, 0, IPC_NOWAIT) == 32 && !strcmp(found.text, "the first"));
    struct shmid_ds about;
    CHECK(shmctl(segment, IPC_STAT, &about) == 0 && about.shm_segsz == 20000);
    char *again = shmat(segment, 0, 0);
    CHECK(again != (void *)-1 && !strcmp(again, memory));
    CHECK(shmctl(segment, IPC_RMID, 0) == 0 && semctl(set, 0, IPC_RMID) == 0);
    CHECK(msgctl(queue, IPC_RMID, 0) == 0);
    verdict("PASS");
}
