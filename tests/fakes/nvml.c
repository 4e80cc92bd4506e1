/* A stand-in for libnvidia-ml.so.1: NVML's entry points over a machine that a text file describes.
 *
 * The file's path is in FAKE_NVML. It is read again whenever it has changed, so that a test drives the machine while a
 * program runs. Lines are `KEY VALUE...`; what is not said is not supported, as on a real GPU:
 *   driver VERSION | absent
 *   gpu INDEX FIELD VALUE        uuid name memory used busy minor pci capability numa ecc recovery remap_failed lost
 *   mig INDEX N UUID GI CI MEMORY PROFILE
 *   nvlink INDEX LINK OTHER      OTHER: a GPU's index, or -1 for a switch
 *   level INDEX OTHER LEVEL      NVML_TOPOLOGY_*
 *   process INDEX PID BYTES
 *   event NUMBER INDEX XID GI    told once, in the order of NUMBER
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

enum { OK, UNINITIALIZED, INVALID, NOT_SUPPORTED, NOT_FOUND = 6, SMALL = 7, NO_DRIVER = 9, TIMEOUT = 10, GPU_LOST = 15 };
enum { GPUS = 16, MIGS = 7, LINKS = 18, PROCESSES = 16, EVENTS = 64, NONE = -1 };

typedef struct { int used, gi, ci, parent; char uuid[80], profile[32]; unsigned long long memory; } Mig;
typedef struct {
    int used, minor, busy, numa, major, small, recovery, remap_failed, lost, processes;
    char uuid[80], name[96], pci[32];
    unsigned long long memory, memory_used, ecc, bytes[PROCESSES];
    unsigned pids[PROCESSES];
    int link[LINKS], level[GPUS];
    Mig mig[MIGS];
} Gpu;
typedef struct { int number, gpu, gi; unsigned long long xid; } Event;
typedef struct { char legacy[16]; unsigned domain, bus, device, id, sub; char bus_id[32]; } Pci;
typedef struct { void *device; unsigned long long type, data; unsigned gi, ci; } EventData;
typedef struct { unsigned pid; unsigned long long used; unsigned gi, ci; } Process;
typedef struct { unsigned field, scope; long long time, latency; int type, result; unsigned long long value; } Field;

static Gpu gpus[GPUS];
static Event events[EVENTS];
static int count, event_count, told, opened, watched[GPUS], absent;
static char version[64];
static struct timespec stamp;

static void load(void) {
    const char *path = getenv("FAKE_NVML");
    struct stat found;
    FILE *file;
    char line[512], word[64], field[64], value[256];
    int i, n, a, b, c;
    unsigned long long big;
    if (!path || stat(path, &found)) { absent = 1; return; }
    if (found.st_mtim.tv_sec == stamp.tv_sec && found.st_mtim.tv_nsec == stamp.tv_nsec) return;
    if (!(file = fopen(path, "r"))) { absent = 1; return; }
    stamp = found.st_mtim;
    memset(gpus, 0, sizeof gpus);
    for (i = 0; i < GPUS; i++) {
        Gpu *g = &gpus[i];
        g->minor = g->busy = g->numa = g->recovery = g->major = NONE;
        for (n = 0; n < LINKS; n++) g->link[n] = -2;
        for (n = 0; n < GPUS; n++) g->level[n] = NONE;
    }
    count = event_count = absent = 0;
    while (fgets(line, sizeof line, file)) {
        if (sscanf(line, "%63s", word) != 1) continue;
        if (!strcmp(word, "absent")) absent = 1;
        else if (!strcmp(word, "driver")) sscanf(line, "%*s %63s", version);
        else if (sscanf(line, "gpu %d %63s %255[^\n]", &i, field, value) == 3 && i < GPUS) {
            Gpu *g = &gpus[i];
            g->used = 1;
            if (i >= count) count = i + 1;
            if (!strcmp(field, "uuid")) snprintf(g->uuid, sizeof g->uuid, "%.79s", value);
            else if (!strcmp(field, "name")) snprintf(g->name, sizeof g->name, "%.95s", value);
            else if (!strcmp(field, "pci")) snprintf(g->pci, sizeof g->pci, "%.31s", value);
            else if (!strcmp(field, "memory")) g->memory = strtoull(value, 0, 10);
            else if (!strcmp(field, "used")) g->memory_used = strtoull(value, 0, 10);
            else if (!strcmp(field, "ecc")) g->ecc = strtoull(value, 0, 10);
            else if (!strcmp(field, "busy")) g->busy = atoi(value);
            else if (!strcmp(field, "minor")) g->minor = atoi(value);
            else if (!strcmp(field, "numa")) g->numa = atoi(value);
            else if (!strcmp(field, "recovery")) g->recovery = atoi(value);
            else if (!strcmp(field, "remap_failed")) g->remap_failed = atoi(value);
            else if (!strcmp(field, "lost")) g->lost = atoi(value);
            else if (!strcmp(field, "capability")) sscanf(value, "%d.%d", &g->major, &g->small);
        } else if (sscanf(line, "mig %d %d %79s %d %d %llu %31s", &i, &n, value, &a, &b, &big, field) == 7 && n < MIGS) {
            Mig *m = &gpus[i].mig[n];
            *m = (Mig){.used = 1, .gi = a, .ci = b, .parent = i, .memory = big};
            snprintf(m->uuid, sizeof m->uuid, "%.79s", value);
            snprintf(m->profile, sizeof m->profile, "%.31s", field);
        } else if (sscanf(line, "nvlink %d %d %d", &a, &b, &c) == 3) gpus[a].link[b] = c;
        else if (sscanf(line, "level %d %d %d", &a, &b, &c) == 3) gpus[a].level[b] = gpus[b].level[a] = c;
        else if (sscanf(line, "process %d %d %llu", &a, &b, &big) == 3 && gpus[a].processes < PROCESSES) {
            gpus[a].pids[gpus[a].processes] = b;
            gpus[a].bytes[gpus[a].processes++] = big;
        } else if (sscanf(line, "event %d %d %llu %d", &n, &a, &big, &c) == 4 && event_count < EVENTS)
            events[event_count++] = (Event){n, a, c, big};
    }
    fclose(file);
}

static int begin(void) { load(); return !opened ? UNINITIALIZED : absent ? NO_DRIVER : OK; }
static Mig *as_mig(void *d) { return (char *)d >= (char *)gpus && (char *)d < (char *)(gpus + GPUS) && ((char *)d - (char *)gpus) % sizeof(Gpu) ? d : 0; }
static int ask(void *d) {
    int r = begin();
    Mig *m = as_mig(d);
    if (r) return r;
    return (m ? gpus[m->parent].lost : ((Gpu *)d)->lost) ? GPU_LOST : OK;
}
#define ASK(d) do { int r_ = ask(d); if (r_) return r_; } while (0)
#define WHOLE(d) do { ASK(d); if (as_mig(d)) return NOT_SUPPORTED; } while (0)

int nvmlInitWithFlags(unsigned f) { (void)f; load(); if (absent) return NO_DRIVER; opened++; return OK; }
int nvmlShutdown(void) { if (opened) opened--; memset(watched, 0, sizeof watched); return OK; }
const char *nvmlErrorString(int r) { return r == NO_DRIVER ? "Driver Not Loaded" : r == GPU_LOST ? "GPU is lost" : "Error"; }
int nvmlSystemGetDriverVersion(char *out, unsigned n) { int r = begin(); if (!r) snprintf(out, n, "%s", version); return r; }
int nvmlDeviceGetCount_v2(unsigned *n) { int r = begin(); if (!r) *n = count; return r; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **d) {
    int r = begin();
    if (r) return r;
    if ((int)i >= count || !gpus[i].used) return NOT_FOUND;
    *d = &gpus[i];
    return gpus[i].lost == 2 ? GPU_LOST : OK;  /* 2: not even a handle is to be had */
}
int nvmlDeviceGetUUID(void *d, char *out, unsigned n) { ASK(d); snprintf(out, n, "%s", as_mig(d) ? as_mig(d)->uuid : ((Gpu *)d)->uuid); return OK; }
int nvmlDeviceGetName(void *d, char *out, unsigned n) {
    Mig *m = as_mig(d);
    ASK(d);
    if (m) snprintf(out, n, "%s MIG %s", gpus[m->parent].name, m->profile);
    else snprintf(out, n, "%s", ((Gpu *)d)->name);
    return OK;
}
int nvmlDeviceGetMemoryInfo(void *d, unsigned long long out[3]) {
    Mig *m = as_mig(d);
    ASK(d);
    out[0] = m ? m->memory : ((Gpu *)d)->memory;
    out[2] = m ? 0 : ((Gpu *)d)->memory_used;
    out[1] = out[0] - out[2];
    return OK;
}
int nvmlDeviceGetMinorNumber(void *d, unsigned *out) { WHOLE(d); if (((Gpu *)d)->minor < 0) return NOT_SUPPORTED; *out = ((Gpu *)d)->minor; return OK; }
int nvmlDeviceGetCudaComputeCapability(void *d, int *a, int *b) { WHOLE(d); if (((Gpu *)d)->major < 0) return NOT_SUPPORTED; *a = ((Gpu *)d)->major; *b = ((Gpu *)d)->small; return OK; }
static void pci(Gpu *g, Pci *out) {
    memset(out, 0, sizeof *out);
    sscanf(g->pci, "%x:%x:%x", &out->domain, &out->bus, &out->device);
    snprintf(out->bus_id, sizeof out->bus_id, "%08X:%02X:%02X.0", out->domain, out->bus, out->device);
}
int nvmlDeviceGetPciInfo_v3(void *d, Pci *out) { WHOLE(d); if (!*((Gpu *)d)->pci) return NOT_SUPPORTED; pci(d, out); return OK; }
int nvmlDeviceGetMemoryAffinity(void *d, unsigned n, unsigned long *out, unsigned scope) {
    (void)scope; WHOLE(d);
    if (((Gpu *)d)->numa < 0 || !n) return NOT_SUPPORTED;
    memset(out, 0, n * sizeof *out);
    out[0] = 1ul << ((Gpu *)d)->numa;
    return OK;
}
int nvmlDeviceGetUtilizationRates(void *d, unsigned out[2]) { WHOLE(d); if (((Gpu *)d)->busy < 0) return NOT_SUPPORTED; out[0] = ((Gpu *)d)->busy; out[1] = 0; return OK; }
int nvmlDeviceGetTotalEccErrors(void *d, int kind, int counter, unsigned long long *out) { WHOLE(d); *out = kind == 1 && counter == 0 ? ((Gpu *)d)->ecc : 0; return OK; }
int nvmlDeviceGetRemappedRows(void *d, unsigned *a, unsigned *b, unsigned *c, unsigned *f) { WHOLE(d); *a = *b = *c = 0; *f = ((Gpu *)d)->remap_failed; return OK; }
int nvmlDeviceGetFieldValues(void *d, int n, Field *out) {
    WHOLE(d);
    for (int i = 0; i < n; i++) {
        out[i].result = out[i].field == 230 && ((Gpu *)d)->recovery >= 0 ? OK : NOT_SUPPORTED;
        out[i].value = out[i].result ? 0 : (unsigned)((Gpu *)d)->recovery;
    }
    return OK;
}
int nvmlDeviceGetTopologyCommonAncestor(void *a, void *b, int *out) { WHOLE(a); int level = ((Gpu *)a)->level[(Gpu *)b - gpus]; if (level < 0) return NOT_SUPPORTED; *out = level; return OK; }
int nvmlDeviceGetNvLinkState(void *d, unsigned link, unsigned *out) { WHOLE(d); if (link >= LINKS) return INVALID; *out = ((Gpu *)d)->link[link] != -2; return OK; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void *d, unsigned link, Pci *out) {
    WHOLE(d);
    int other = ((Gpu *)d)->link[link];
    if (other == -2) return INVALID;
    if (other >= 0) pci(&gpus[other], out);
    else { memset(out, 0, sizeof *out); out->domain = 0xffff; }
    return OK;
}
int nvmlDeviceGetP2PStatus(void *a, void *b, int what, int *out) {
    WHOLE(a);
    int here = 0, there = 0;
    for (int i = 0; i < LINKS; i++) { here |= ((Gpu *)a)->link[i] == -1; there |= ((Gpu *)b)->link[i] == -1; }
    *out = what == 2 && here && there ? 0 : 5;
    return OK;
}
int nvmlDeviceGetMigMode(void *d, unsigned *a, unsigned *b) { WHOLE(d); *a = *b = ((Gpu *)d)->mig[0].used; return OK; }
int nvmlDeviceGetMaxMigDeviceCount(void *d, unsigned *n) { WHOLE(d); *n = MIGS; return OK; }
int nvmlDeviceGetMigDeviceHandleByIndex(void *d, unsigned i, void **out) { WHOLE(d); if (i >= MIGS || !((Gpu *)d)->mig[i].used) return NOT_FOUND; *out = &((Gpu *)d)->mig[i]; return OK; }
int nvmlDeviceGetGpuInstanceId(void *d, unsigned *out) { ASK(d); if (!as_mig(d)) return NOT_SUPPORTED; *out = as_mig(d)->gi; return OK; }
int nvmlDeviceGetComputeInstanceId(void *d, unsigned *out) { ASK(d); if (!as_mig(d)) return NOT_SUPPORTED; *out = as_mig(d)->ci; return OK; }
int nvmlDeviceGetComputeRunningProcesses_v3(void *d, unsigned *n, Process *out) {
    WHOLE(d);
    Gpu *g = d;
    unsigned room = *n;
    *n = g->processes;
    if ((int)room < g->processes) return SMALL;
    for (int i = 0; i < g->processes; i++) out[i] = (Process){g->pids[i], g->bytes[i], ~0u, ~0u};
    return OK;
}
int nvmlDeviceGetSupportedEventTypes(void *d, unsigned long long *out) { WHOLE(d); *out = 0x8 | 0x2; return OK; }
int nvmlEventSetCreate(void **set) { int r = begin(); *set = watched; return r; }
int nvmlEventSetFree(void *set) { (void)set; memset(watched, 0, sizeof watched); return OK; }
int nvmlDeviceRegisterEvents(void *d, unsigned long long types, void *set) { (void)set; WHOLE(d); if (types & 8) watched[(Gpu *)d - gpus] = 1; return OK; }
int nvmlEventSetWait_v2(void *set, EventData *out, unsigned timeout_ms) {
    (void)set;
    for (unsigned waited = 0;; waited += 10) {
        int r = begin();
        if (r) return r;
        for (int i = 0; i < event_count; i++) {
            Event *e = &events[i];
            if (e->number <= told || e->gpu < 0 || !watched[e->gpu]) continue;
            told = e->number;
            *out = (EventData){&gpus[e->gpu], 8, e->xid, e->gi < 0 ? ~0u : (unsigned)e->gi, ~0u};
            return OK;
        }
        if (waited >= timeout_ms) return TIMEOUT;
        nanosleep(&(struct timespec){0, 10000000}, 0);
    }
}
