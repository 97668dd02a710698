// Stands in for NCCL in tests: ranks are threads of one process, and devices' memory is the host's.
//
// It has the functions of nccl.h that the crate calls, with NCCL's rules for groups, for communicators that
// do not block and for splits, and functions `stub_*` by which a test makes it fail. Each loaded copy of the
// file is a library of its own, so tests that each load a copy do not meet.

#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SUCCESS, UNHANDLED_CUDA, SYSTEM, INTERNAL, INVALID_ARGUMENT, INVALID_USAGE, REMOTE, IN_PROGRESS, TIMEOUT };
enum { MOST_RANKS = 8, MOST_TASKS = 64, MOST_FUNCTIONS = 64, PATIENCE_S = 30 };

typedef struct { char bytes[128]; } Id;

// ncclConfig_t of 2.18, 2.26, 2.27 and 2.28.
#define CONFIG_18 \
    size_t size; unsigned magic, version; int blocking, cga, min_ctas, max_ctas; const char *net_name; int split_share;
#define CONFIG_26 CONFIG_18 int traffic_class;
#define CONFIG_27 CONFIG_26 const char *comm_name; int collnet, cta_policy, shrink_share, nvls_ctas;
#define CONFIG_28 CONFIG_27 int channels_per_net_peer, nvlink_centric;
typedef struct { CONFIG_18 } Config18;
typedef struct { CONFIG_26 } Config26;
typedef struct { CONFIG_27 } Config27;
typedef struct { CONFIG_28 } Config;

typedef enum { ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, BROADCAST, REDUCE, SPLIT, FINALIZE, SEND, RECV } Kind;

typedef struct Comm Comm;

typedef struct Task {
    Kind kind;
    Comm *comm;
    const void *from;
    void *to;
    size_t count;
    int type, op, root; // root, peer or color
    int key;
    int sent;
    Comm **made;
    const Config *config;
    int answer;
    struct Task *next; // in the mail
} Task;

typedef struct Clique {
    char id[128];
    int size, arrived;
    unsigned round;
    int posted;
    Task *meeting[MOST_RANKS];
    Task *mail[MOST_RANKS][MOST_RANKS]; // from, to: what is offered, the first first
    struct Clique *next;
} Clique;

struct Comm {
    Clique *clique;
    int rank, blocking, aborted, working, state, finalized;
    const char *name;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static Clique *cliques;
static char last_error[1024], warning[512], async_name[64];
static Config last_config;

static int version = 22809, endless, async_error, forced_blocking = -1;
static struct { char name[48]; int calls, answer; } functions[MOST_FUNCTIONS];

static __thread int depth;
static __thread int tasks;
static __thread Task queue[MOST_TASKS];

// What tests set and ask.

static int slot_of(const char *name) {
    int at = 0;
    while (at < MOST_FUNCTIONS - 1 && functions[at].name[0] && strcmp(functions[at].name, name)) at++;
    strncpy(functions[at].name, name, sizeof functions[at].name - 1);
    return at;
}

void stub_set_version(int code) { version = code; }
void stub_set_endless(int on) { pthread_mutex_lock(&lock); endless = on; pthread_mutex_unlock(&lock); }

// For communicators of this name, all without one.
void stub_set_async_error(int code, const char *name) {
    pthread_mutex_lock(&lock);
    async_error = code;
    snprintf(async_name, sizeof async_name, "%s", name ? name : "");
    pthread_mutex_unlock(&lock);
}

// What calls that fail say.
void stub_set_warning(const char *text) {
    pthread_mutex_lock(&lock);
    snprintf(warning, sizeof warning, "%s", text);
    pthread_mutex_unlock(&lock);
}

// As NCCL_COMM_BLOCKING, which overrules configurations. A variable would be one for all tests of the process.
void stub_set_blocking(int on) { pthread_mutex_lock(&lock); forced_blocking = on; pthread_mutex_unlock(&lock); }

void stub_fail(const char *name, int answer) {
    pthread_mutex_lock(&lock);
    functions[slot_of(name)].answer = answer;
    pthread_mutex_unlock(&lock);
}

int stub_calls(const char *name) {
    pthread_mutex_lock(&lock);
    int calls = functions[slot_of(name)].calls;
    pthread_mutex_unlock(&lock);
    return calls;
}

int stub_open_groups(void) { return depth; }

long stub_config(const char *field) {
    const Config *c = &last_config;
    if (!strcmp(field, "size")) return (long)c->size;
    if (!strcmp(field, "version")) return c->version;
    if (!strcmp(field, "blocking")) return c->blocking;
    if (!strcmp(field, "cga_cluster_size")) return c->cga;
    if (!strcmp(field, "min_ctas")) return c->min_ctas;
    if (!strcmp(field, "max_ctas")) return c->max_ctas;
    if (!strcmp(field, "split_share")) return c->split_share;
    if (!strcmp(field, "traffic_class")) return c->traffic_class;
    if (!strcmp(field, "nvls_ctas")) return c->nvls_ctas;
    if (!strcmp(field, "channels_per_net_peer")) return c->channels_per_net_peer;
    return -1;
}

const char *stub_config_text(const char *field) {
    return strcmp(field, "name") ? last_config.net_name : last_config.comm_name;
}

// Counts a call, and says how it is to fail.
static int called(const char *name) {
    pthread_mutex_lock(&lock);
    int at = slot_of(name);
    functions[at].calls++;
    int answer = functions[at].answer;
    if (answer && answer != IN_PROGRESS)
        snprintf(last_error, sizeof last_error, "%s%s", warning[0] ? warning : name, warning[0] ? "" : " was told to fail");
    pthread_mutex_unlock(&lock);
    return answer;
}
#define CALLED() do { int answer = called(__func__); if (answer) return answer; } while (0)

// Values.

static size_t bytes_of(int type) {
    static const size_t bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
    return bytes[type];
}

static double get(int type, const void *values, size_t at) {
    switch (type) {
    case 0: return ((const int8_t *)values)[at];
    case 1: return ((const uint8_t *)values)[at];
    case 2: return ((const int32_t *)values)[at];
    case 3: return ((const uint32_t *)values)[at];
    case 4: return (double)((const int64_t *)values)[at];
    case 5: return (double)((const uint64_t *)values)[at];
    case 7: return ((const float *)values)[at];
    case 8: return ((const double *)values)[at];
    case 9: {
        uint32_t bits = (uint32_t)((const uint16_t *)values)[at] << 16;
        float value;
        memcpy(&value, &bits, sizeof value);
        return value;
    }
    default: return 0;
    }
}

static void put(int type, void *values, size_t at, double value) {
    switch (type) {
    case 0: ((int8_t *)values)[at] = (int8_t)value; break;
    case 1: ((uint8_t *)values)[at] = (uint8_t)value; break;
    case 2: ((int32_t *)values)[at] = (int32_t)value; break;
    case 3: ((uint32_t *)values)[at] = (uint32_t)value; break;
    case 4: ((int64_t *)values)[at] = (int64_t)value; break;
    case 5: ((uint64_t *)values)[at] = (uint64_t)value; break;
    case 7: ((float *)values)[at] = (float)value; break;
    case 8: ((double *)values)[at] = value; break;
    case 9: {
        float single = (float)value;
        uint32_t bits;
        memcpy(&bits, &single, sizeof bits);
        ((uint16_t *)values)[at] = (uint16_t)(bits >> 16);
        break;
    }
    }
}

static double combine(int op, double left, double right) {
    switch (op) {
    case 1: return left * right;
    case 2: return left > right ? left : right;
    case 3: return left < right ? left : right;
    default: return left + right;
    }
}

// Value `at` of the inputs of all ranks, as one.
static double combined(Clique *clique, size_t at) {
    Task *first = clique->meeting[0];
    double value = get(first->type, first->from, at);
    for (int rank = 1; rank < clique->size; rank++)
        value = combine(first->op, value, get(first->type, clique->meeting[rank]->from, at));
    return first->op == 4 ? value / clique->size : value;
}

// Waits until something changes, under the lock; 0 when that takes so long that a rank must have gone astray: its
// test is to fail, not to hang.
static int wait_for_change(void) {
    struct timespec end;
    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_sec += PATIENCE_S;
    return pthread_cond_timedwait(&changed, &lock, &end) != ETIMEDOUT;
}

// Why `comm` waits no longer for what has not come.
static int given_up(const Comm *comm) { return comm->aborted ? INTERNAL : TIMEOUT; }

// Meetings of all ranks; the last to come does the work of all. Under the lock.

static Comm *new_comm(Clique *clique, int rank, int blocking) {
    Comm *comm = calloc(1, sizeof *comm);
    comm->clique = clique;
    comm->rank = rank;
    comm->blocking = forced_blocking < 0 ? blocking : forced_blocking;
    return comm;
}

static void split(Clique *clique) {
    for (int rank = 0; rank < clique->size; rank++) {
        Task *task = clique->meeting[rank];
        if (task->root < 0) continue;
        int place = 0, size = 0, first = -1;
        for (int other = 0; other < clique->size; other++) {
            Task *with = clique->meeting[other];
            if (with->root != task->root) continue;
            if (first < 0) first = other;
            size++;
            place += with->key < task->key || (with->key == task->key && other < rank);
        }
        // The first of a color has made the clique when the others come by.
        Clique *part = first == rank ? calloc(1, sizeof *part) : (*clique->meeting[first]->made)->clique;
        part->size = part->arrived = size;
        *task->made = new_comm(part, place, task->config ? task->config->blocking : task->comm->blocking);
    }
}

static void work(Clique *clique) {
    Task *first = clique->meeting[0];
    int size = clique->size, answer = SUCCESS;
    for (int rank = 1; rank < size; rank++) {
        Task *task = clique->meeting[rank];
        int same = task->kind == first->kind && task->count == first->count && task->type == first->type;
        if (!same) answer = INVALID_USAGE;
    }
    for (int rank = 0; rank < size; rank++) clique->meeting[rank]->answer = answer;
    if (answer) return;
    if (first->kind == SPLIT) return split(clique);
    if (first->kind == FINALIZE) return;
    size_t bytes = bytes_of(first->type), count = first->count;
    // Everything is read before anything is written: inputs and outputs may be one.
    size_t all = first->kind == ALL_GATHER || first->kind == REDUCE_SCATTER ? count * size : count;
    char *result = calloc(all + 1, bytes);
    for (size_t at = 0; at < all; at++) {
        if (first->kind == ALL_GATHER)
            memcpy(result + at * bytes, (const char *)clique->meeting[at / count]->from + at % count * bytes, bytes);
        else if (first->kind == BROADCAST)
            memcpy(result + at * bytes, (const char *)clique->meeting[first->root]->from + at * bytes, bytes);
        else
            put(first->type, result, at, combined(clique, at));
    }
    for (int rank = 0; rank < size; rank++) {
        Task *task = clique->meeting[rank];
        if (task->kind == REDUCE_SCATTER) memcpy(task->to, result + rank * count * bytes, count * bytes);
        else if (task->kind != REDUCE || rank == task->root) memcpy(task->to, result, all * bytes);
    }
    free(result);
}

static int meet(Task *task) {
    Comm *comm = task->comm;
    Clique *clique = comm->clique;
    unsigned round = clique->round;
    clique->meeting[comm->rank] = task;
    if (++clique->posted == clique->size) {
        work(clique);
        clique->posted = 0;
        clique->round++;
        pthread_cond_broadcast(&changed);
        return task->answer;
    }
    while (clique->round == round && !comm->aborted && wait_for_change()) {}
    if (clique->round != round) return task->answer;
    clique->posted--;
    return given_up(comm);
}

static int receive(Task *task) {
    Comm *comm = task->comm;
    Task **mail = &comm->clique->mail[task->root][comm->rank];
    while (!*mail && !comm->aborted && wait_for_change()) {}
    if (!*mail) return given_up(comm);
    Task *sent = *mail;
    int same = sent->count == task->count && sent->type == task->type;
    if (same) memcpy(task->to, sent->from, task->count * bytes_of(task->type));
    sent->sent = 1;
    *mail = sent->next;
    pthread_cond_broadcast(&changed);
    return same ? SUCCESS : INVALID_USAGE;
}

// A group of tasks: sends are offered, the others done in their order, then sends waited for. Under the lock.
static int perform(Task *list, int count) {
    int answer = SUCCESS;
    for (int at = 0; at < count; at++) {
        Task *task = &list[at];
        if (task->kind != SEND) continue;
        Task **mail = &task->comm->clique->mail[task->comm->rank][task->root];
        while (*mail) mail = &(*mail)->next;
        *mail = task;
        pthread_cond_broadcast(&changed);
    }
    for (int at = 0; at < count && !answer; at++) {
        if (list[at].kind == SEND) continue;
        answer = list[at].kind == RECV ? receive(&list[at]) : meet(&list[at]);
    }
    for (int at = 0; at < count; at++) {
        Task *task = &list[at];
        if (task->kind != SEND) continue;
        Task **mail = &task->comm->clique->mail[task->comm->rank][task->root];
        while (!task->sent && !task->comm->aborted && wait_for_change()) {}
        while (*mail && *mail != task) mail = &(*mail)->next;
        if (*mail) *mail = task->next;
        if (!task->sent && !answer) answer = given_up(task->comm);
    }
    return answer;
}

typedef struct { int count; Config config; Task list[MOST_TASKS]; } Job;

static void *background(void *argument) {
    Job *job = argument;
    pthread_mutex_lock(&lock);
    int answer = perform(job->list, job->count);
    for (int at = 0; at < job->count; at++) {
        // A communicator that another task of the list has settled may be gone.
        int seen = 0;
        for (int before = 0; before < at; before++) seen |= job->list[before].comm == job->list[at].comm;
        if (seen) continue;
        job->list[at].comm->state = answer;
        job->list[at].comm->working--;
    }
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    free(job);
    return NULL;
}

static int start(Task *list, int count) {
    if (!count) return SUCCESS;
    pthread_mutex_lock(&lock);
    for (int at = 1; at < count; at++) {
        if (list[at].comm->blocking == list[0].comm->blocking) continue;
        pthread_mutex_unlock(&lock);
        return INVALID_ARGUMENT;
    }
    if (list[0].comm->blocking) {
        int answer = perform(list, count);
        pthread_mutex_unlock(&lock);
        return answer;
    }
    Job *job = calloc(1, sizeof *job);
    job->count = count;
    for (int at = 0; at < count; at++) {
        Task *task = &job->list[at];
        *task = list[at];
        if (task->config) {
            job->config = *task->config;
            task->config = &job->config;
        }
        int seen = 0;
        for (int before = 0; before < at; before++) seen |= list[before].comm == task->comm;
        if (seen) continue;
        task->comm->state = IN_PROGRESS;
        task->comm->working++;
    }
    pthread_t thread;
    pthread_create(&thread, NULL, background, job);
    pthread_detach(thread);
    pthread_mutex_unlock(&lock);
    return IN_PROGRESS;
}

static int enqueue(Task task) {
    if (!task.comm || task.type < 0 || task.type > 11 || tasks == MOST_TASKS) return INVALID_ARGUMENT;
    if (task.comm->finalized) return INVALID_USAGE;
    if (depth) {
        queue[tasks++] = task;
        return SUCCESS;
    }
    return start(&task, 1);
}

// The functions of nccl.h.

int ncclGetVersion(int *code) {
    CALLED();
    *code = version;
    return SUCCESS;
}

int ncclGetUniqueId(Id *id) {
    static int made;
    CALLED();
    pthread_mutex_lock(&lock);
    memset(id, 0, sizeof *id);
    snprintf(id->bytes, sizeof id->bytes, "clique %d", ++made);
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

const char *ncclGetErrorString(int answer) {
    static const char *const texts[] = {
        "no error", "unhandled cuda error", "unhandled system error", "internal error", "invalid argument",
        "invalid usage", "remote process exited or there was a network error", "NCCL operation in progress",
        "timeout",
    };
    return answer >= 0 && answer <= TIMEOUT ? texts[answer] : "unknown result code";
}

const char *ncclGetLastError(Comm *comm) {
    (void)comm;
    return last_error;
}

int ncclGroupStart(void) {
    CALLED();
    depth++;
    return SUCCESS;
}

int ncclGroupEnd(void) {
    if (!depth) return INVALID_USAGE;
    if (--depth) return SUCCESS;
    int count = tasks;
    tasks = 0;
    CALLED();
    return start(queue, count);
}

// Takes the configuration as a library of this version does.
static int read_config(const void *given) {
    size_t size;
    memcpy(&size, given, sizeof size);
    size_t known = version >= 22800 ? sizeof(Config) : version >= 22700 ? sizeof(Config27)
        : version >= 22600 ? sizeof(Config26) : sizeof(Config18);
    if (size != known) return INVALID_ARGUMENT;
    memset(&last_config, 0, sizeof last_config);
    memcpy(&last_config, given, size);
    return last_config.magic == 0xcafebeef ? SUCCESS : INVALID_ARGUMENT;
}

static void *join(void *argument) {
    Comm *comm = argument;
    Clique *clique = comm->clique;
    pthread_mutex_lock(&lock);
    clique->arrived++;
    pthread_cond_broadcast(&changed);
    while (clique->arrived < clique->size && !comm->aborted && wait_for_change()) {}
    comm->state = clique->arrived < clique->size ? given_up(comm) : SUCCESS;
    comm->working--;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    return NULL;
}

int ncclCommInitRankConfig(Comm **made, int size, Id id, int rank, void *config) {
    *made = NULL;
    CALLED();
    if (size > MOST_RANKS || rank < 0 || rank >= size) return INVALID_ARGUMENT;
    pthread_mutex_lock(&lock);
    int answer = read_config(config);
    Clique *clique = cliques;
    while (clique && memcmp(clique->id, id.bytes, sizeof id.bytes)) clique = clique->next;
    if (!clique) {
        clique = calloc(1, sizeof *clique);
        memcpy(clique->id, id.bytes, sizeof id.bytes);
        clique->size = size;
        clique->next = cliques;
        cliques = clique;
    }
    if (clique->size != size) answer = INVALID_ARGUMENT;
    Comm *comm = answer ? NULL : new_comm(clique, rank, last_config.blocking);
    if (comm) comm->name = last_config.comm_name;
    pthread_mutex_unlock(&lock);
    if (!comm) return answer;
    comm->working = 1;
    comm->state = IN_PROGRESS;
    *made = comm;
    // A start that fails on its way leaves a communicator behind.
    answer = called("joining");
    if (answer) return comm->working = 0, answer;
    if (comm->blocking) return join(comm), comm->state;
    pthread_t thread;
    pthread_create(&thread, NULL, join, comm);
    pthread_detach(thread);
    return IN_PROGRESS;
}

int ncclCommSplit(Comm *comm, int color, int key, Comm **made, void *config) {
    *made = NULL;
    CALLED();
    Config read;
    if (config) {
        pthread_mutex_lock(&lock);
        int answer = read_config(config);
        read = last_config;
        pthread_mutex_unlock(&lock);
        if (answer) return answer;
    }
    return enqueue((Task){
        .kind = SPLIT, .comm = comm, .root = color, .key = key, .made = made, .config = config ? &read : NULL,
    });
}

int ncclCommFinalize(Comm *comm) {
    CALLED();
    int answer = enqueue((Task){.kind = FINALIZE, .comm = comm});
    comm->finalized = 1;
    return answer;
}

static void release(Comm *comm) {
    pthread_mutex_lock(&lock);
    comm->aborted = 1;
    pthread_cond_broadcast(&changed);
    while (comm->working) pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
    free(comm);
}

int ncclCommDestroy(Comm *comm) {
    CALLED();
    release(comm);
    return SUCCESS;
}

int ncclCommAbort(Comm *comm) {
    CALLED();
    release(comm);
    return SUCCESS;
}

int ncclCommGetAsyncError(Comm *comm, int *state) {
    CALLED();
    pthread_mutex_lock(&lock);
    int meant = !async_name[0] || (comm->name && !strcmp(comm->name, async_name));
    *state = endless ? IN_PROGRESS : async_error && meant ? async_error : comm->state;
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

int ncclCommCount(Comm *comm, int *count) {
    CALLED();
    *count = comm->clique->size;
    return SUCCESS;
}

int ncclCommUserRank(Comm *comm, int *rank) {
    CALLED();
    *rank = comm->rank;
    return SUCCESS;
}

int ncclCommCuDevice(Comm *comm, int *device) {
    (void)comm;
    CALLED();
    *device = 0;
    return SUCCESS;
}

int ncclAllReduce(const void *from, void *to, size_t count, int type, int op, Comm *comm, void *stream) {
    (void)stream;
    CALLED();
    return enqueue((Task){ALL_REDUCE, comm, from, to, count, type, .op = op});
}

int ncclReduceScatter(const void *from, void *to, size_t count, int type, int op, Comm *comm, void *stream) {
    (void)stream;
    CALLED();
    return enqueue((Task){REDUCE_SCATTER, comm, from, to, count, type, .op = op});
}

int ncclAllGather(const void *from, void *to, size_t count, int type, Comm *comm, void *stream) {
    (void)stream;
    CALLED();
    return enqueue((Task){ALL_GATHER, comm, from, to, count, type, .op = 0});
}

int ncclBroadcast(const void *from, void *to, size_t count, int type, int root, Comm *comm, void *stream) {
    (void)stream;
    CALLED();
    return enqueue((Task){BROADCAST, comm, from, to, count, type, .root = root});
}

int ncclReduce(const void *from, void *to, size_t count, int type, int op, int root, Comm *comm, void *stream) {
    (void)stream;
    CALLED();
    return enqueue((Task){REDUCE, comm, from, to, count, type, .op = op, .root = root});
}

int ncclSend(const void *from, size_t count, int type, int peer, Comm *comm, void *stream) {
    (void)stream;
    CALLED();
    return enqueue((Task){SEND, comm, from, NULL, count, type, .root = peer});
}

int ncclRecv(void *to, size_t count, int type, int peer, Comm *comm, void *stream) {
    (void)stream;
    CALLED();
    return enqueue((Task){RECV, comm, NULL, to, count, type, .root = peer});
}

int ncclCommRegister(Comm *comm, void *memory, size_t bytes, void **handle) {
    (void)comm;
    CALLED();
    *handle = (char *)memory + bytes;
    return SUCCESS;
}

int ncclCommDeregister(Comm *comm, void *handle) {
    (void)comm;
    CALLED();
    return handle ? SUCCESS : INVALID_ARGUMENT;
}
