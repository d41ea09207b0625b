/* A stub of libnvidia-ml.so.1 for tests: no GPU, no driver. It answers the calls that ds01spawner makes through
 * nvidia-ml-py from a topology file, named by DS01_NVML_STUB and read again at nvmlInit and nvmlDeviceGetCount, so
 * that a GPU can be lost between two reads. The lines of the file are described in topology.py.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };
enum { GPUS = 16, INSTANCES = 8, PROFILES = 18, ROWS = 64, TEXT = 96 };

typedef struct { unsigned start, size; } placement_t;
typedef struct { uint32_t id, p2p, slices, instances, sms, copy, dec, enc, jpeg, ofa; uint64_t memory; } profile_v1_t;
typedef struct { uint32_t version, id, p2p, slices, instances, sms, copy, dec, enc, jpeg, ofa; uint64_t memory; char name[TEXT]; } profile_v2_t;
typedef struct { void *device; uint32_t id, profile; placement_t placement; } gi_info_t;
typedef struct { uint32_t sms, copy, dec, enc, jpeg, ofa, gi_slices, ci_slices; uint64_t memory; } attributes_t;
typedef struct { char legacy[16]; uint32_t domain, bus, device, id, subsystem; char bus_id[32]; } pci_t;
typedef struct { uint64_t total, free, used; } memory_t;
typedef struct { uint32_t pid; uint64_t memory; uint32_t gi, ci; } process_t;

typedef struct { int there, gi, ci, profile, gi_slices, ci_slices, start, size, sram; long memory; char uuid[TEXT], name[TEXT]; } instance_t;
typedef struct { int there, id, slices, memory, size, starts[8], count; char name[TEXT]; } shape_t;
typedef struct {
    int major, minor, node, mig, pending, row_pending, row_failure, ecc, nvlinks, nvlink_to[36], level[GPUS];
    long memory;
    char bus[32], uuid[TEXT], name[TEXT];
    instance_t instance[INSTANCES];
    shape_t shape[PROFILES];
} gpu_t;
typedef struct { int gpu, mig, pid; long memory; char kind; } use_t;
typedef struct { int gpu, mig, code; char function[TEXT]; } fault_t;

static gpu_t gpus[GPUS];
static use_t uses[ROWS];
static fault_t faults[ROWS];
static int gpu_count, use_count, fault_count, init_code, up;
static char driver[TEXT];

static void read_shape(const char *text) {
    int gpu, profile, id, slices, memory, size, end = 0;
    char starts[TEXT], name[TEXT];
    if (sscanf(text, "%d %d %d %d %d %d %95s %95s", &gpu, &profile, &id, &slices, &memory, &size, starts, name) != 8) return;
    shape_t *shape = &gpus[gpu].shape[profile];
    *shape = (shape_t){.there = 1, .id = id, .slices = slices, .memory = memory, .size = size};
    snprintf(shape->name, TEXT, "MIG %.90s", name);
    for (char *at = starts; shape->count < 8 && sscanf(at, "%d%n", &shape->starts[shape->count], &end) == 1;) {
        shape->count++;
        at += end;
        if (*at++ != ',') break;
    }
}

static void read_instance(const char *text) {
    int gpu, index;
    instance_t new = {.there = 1};
    if (sscanf(text, "%d %d %95s %d %d %d %d %d %ld %d %d %95[^\n]", &gpu, &index, new.uuid, &new.gi, &new.ci, &new.profile,
               &new.gi_slices, &new.ci_slices, &new.memory, &new.start, &new.size, new.name) >= 11)
        gpus[gpu].instance[index] = new;
}

static void read_line(const char *line) {
    char word[TEXT], text[512] = "", target[TEXT];
    int one, other, number;
    if (sscanf(line, "%95s %511[^\n]", word, text) < 1 || word[0] == '#') return;
    if (!strcmp(word, "driver")) snprintf(driver, TEXT, "%.90s", text);
    if (!strcmp(word, "init")) init_code = atoi(text);
    if (!strcmp(word, "gpu")) {
        gpu_t *gpu = &gpus[gpu_count];
        gpu->node = gpu_count++;
        sscanf(text, "%31s %95s %ld %d.%d %d %d %95[^\n]", gpu->bus, gpu->uuid, &gpu->memory, &gpu->major, &gpu->minor, &gpu->mig,
               &gpu->pending, gpu->name);
    }
    if (!strcmp(word, "profile")) read_shape(text);
    if (!strcmp(word, "mig")) read_instance(text);
    if (!strcmp(word, "process")) {
        use_t *use = &uses[use_count++];
        sscanf(text, "%d %d %d %ld %c", &use->gpu, &use->mig, &use->pid, &use->memory, &use->kind);
    }
    if (!strcmp(word, "rows")) {
        sscanf(text, "%d", &one);
        sscanf(text, "%*d %d %d", &gpus[one].row_pending, &gpus[one].row_failure);
    }
    if (!strcmp(word, "minor") && sscanf(text, "%d %d", &one, &number) == 2) gpus[one].node = number;
    if (!strcmp(word, "ecc") && sscanf(text, "%d %d", &one, &number) == 2) gpus[one].ecc = number;
    if (!strcmp(word, "sram") && sscanf(text, "%d %d %d", &one, &other, &number) == 3) gpus[one].instance[other].sram = number;
    if (!strcmp(word, "topo") && sscanf(text, "%d %d %d", &one, &other, &number) == 3)
        gpus[one].level[other] = gpus[other].level[one] = number;
    if (!strcmp(word, "nvlink") && sscanf(text, "%d %d %d", &one, &other, &number) == 3)
        while (number-- > 0) {
            gpus[one].nvlink_to[gpus[one].nvlinks++] = other;
            if (other >= 0) gpus[other].nvlink_to[gpus[other].nvlinks++] = one;
        }
    if (!strcmp(word, "error") && sscanf(text, "%95s %95s %d", target, faults[fault_count].function, &number) == 3) {
        fault_t *fault = &faults[fault_count++];
        fault->code = number;
        fault->mig = -1;
        sscanf(target, "%d.%d", &fault->gpu, &fault->mig);
    }
}

static void load(void) {
    const char *path = getenv("DS01_NVML_STUB");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[1024];
    memset(gpus, 0, sizeof gpus);
    memset(uses, 0, sizeof uses);
    memset(faults, 0, sizeof faults);
    gpu_count = use_count = fault_count = init_code = 0;
    while (file && fgets(line, sizeof line, file)) read_line(line);
    if (file) fclose(file);
}

/* Handles: GPUs from 0x1000, their instances from 0x2000, GPU instances from 0x4000 (by GI id). */
static int gpu_of(void *handle) {
    uintptr_t at = (uintptr_t)handle;
    return at >= 0x4000 ? (int)(at - 0x4000) / 64 : at >= 0x2000 ? (int)(at - 0x2000) / 64 : (int)(at - 0x1000);
}
static int mig_of(void *handle) {
    uintptr_t at = (uintptr_t)handle;
    return at >= 0x2000 && at < 0x4000 ? (int)(at - 0x2000) % 64 : -1;
}
static instance_t *instance_of(void *handle) { return mig_of(handle) < 0 ? NULL : &gpus[gpu_of(handle)].instance[mig_of(handle)]; }

/* The planned error of a call; a handle whose GPU or instance is gone is no argument. */
static int plan(const char *function, void *handle) {
    int gpu = handle ? gpu_of(handle) : -1, mig = handle ? mig_of(handle) : -1;
    if (!up) return UNINITIALIZED;
    if (handle && (gpu >= gpu_count || (mig >= 0 && !gpus[gpu].instance[mig].there))) return INVALID_ARGUMENT;
    for (int i = 0; i < fault_count; i++)
        if (faults[i].gpu == gpu && (faults[i].mig < 0 || faults[i].mig == mig) &&
            (!strcmp(faults[i].function, function) || !strcmp(faults[i].function, "*")))
            return faults[i].code;
    return OK;
}
#define PLAN(handle) do { int code = plan(__func__, handle); if (code) return code; } while (0)

int nvmlInitWithFlags(unsigned flags) { (void)flags; load(); up = !init_code; return init_code; }
int nvmlShutdown(void) { if (!up) return UNINITIALIZED; up = 0; return OK; }
const char *nvmlErrorString(int code) { (void)code; return "an error of the stub"; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { PLAN(NULL); snprintf(text, size, "%s", driver); return OK; }
int nvmlDeviceGetCount_v2(unsigned *count) { load(); PLAN(NULL); *count = (unsigned)gpu_count; return OK; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    *device = (void *)(uintptr_t)(0x1000 + index);
    PLAN(*device);
    return OK;
}
static int pci(void *device, pci_t *info) {
    memset(info, 0, sizeof *info);
    snprintf(info->bus_id, sizeof info->bus_id, "%s", gpus[gpu_of(device)].bus);
    return OK;
}
int nvmlDeviceGetPciInfo_v3(void *device, pci_t *info) { PLAN(device); return pci(device, info); }
int nvmlDeviceGetUUID(void *device, char *text, unsigned size) {
    PLAN(device);
    snprintf(text, size, "%s", instance_of(device) ? instance_of(device)->uuid : gpus[gpu_of(device)].uuid);
    return OK;
}
int nvmlDeviceGetName(void *device, char *text, unsigned size) {
    PLAN(device);
    snprintf(text, size, "%s", instance_of(device) ? instance_of(device)->name : gpus[gpu_of(device)].name);
    return OK;
}
int nvmlDeviceGetMemoryInfo(void *device, memory_t *memory) {
    PLAN(device);
    uint64_t total = (uint64_t)gpus[gpu_of(device)].memory << 20;
    *memory = (memory_t){total, total, 0};
    return OK;
}
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
    PLAN(device);
    *major = gpus[gpu_of(device)].major;
    *minor = gpus[gpu_of(device)].minor;
    return OK;
}
int nvmlDeviceGetMinorNumber(void *device, unsigned *minor) {
    PLAN(device);
    *minor = (unsigned)gpus[gpu_of(device)].node;
    return OK;
}
int nvmlDeviceGetMigMode(void *device, unsigned *current, unsigned *pending) {
    PLAN(device);
    *current = (unsigned)gpus[gpu_of(device)].mig;
    *pending = (unsigned)gpus[gpu_of(device)].pending;
    return OK;
}
int nvmlDeviceGetGpuInstanceProfileInfoV(void *device, unsigned profile, profile_v2_t *info) {
    PLAN(device);
    shape_t *shape = &gpus[gpu_of(device)].shape[profile];
    if (!shape->there) return NOT_SUPPORTED;
    info->id = (uint32_t)shape->id;
    info->slices = (uint32_t)shape->slices;
    info->instances = (uint32_t)shape->count;
    info->memory = (uint64_t)shape->memory;
    snprintf(info->name, TEXT, "%s", shape->name);
    return OK;
}
int nvmlDeviceGetGpuInstanceProfileInfo(void *device, unsigned profile, profile_v1_t *info) {
    PLAN(device);
    shape_t *shape = &gpus[gpu_of(device)].shape[profile];
    if (!shape->there) return NOT_SUPPORTED;
    info->id = (uint32_t)shape->id;
    info->slices = (uint32_t)shape->slices;
    info->memory = (uint64_t)shape->memory;
    return OK;
}
int nvmlDeviceGetGpuInstancePossiblePlacements_v2(void *device, unsigned id, placement_t *out, unsigned *count) {
    PLAN(device);
    for (int i = 0; i < PROFILES; i++) {
        shape_t *shape = &gpus[gpu_of(device)].shape[i];
        if (!shape->there || shape->id != (int)id) continue;
        for (int j = 0; out && j < shape->count; j++) out[j] = (placement_t){(unsigned)shape->starts[j], (unsigned)shape->size};
        *count = (unsigned)shape->count;
        return OK;
    }
    return INVALID_ARGUMENT;
}
int nvmlDeviceGetMaxMigDeviceCount(void *device, unsigned *count) {
    PLAN(device);
    *count = gpus[gpu_of(device)].mig ? 7 : 0;
    return OK;
}
int nvmlDeviceGetMigDeviceHandleByIndex(void *device, unsigned index, void **instance) {
    PLAN(device);
    if (!gpus[gpu_of(device)].instance[index].there) return index % 2 ? INVALID_ARGUMENT : NOT_FOUND;
    *instance = (void *)(uintptr_t)(0x2000 + gpu_of(device) * 64 + (int)index);
    return OK;
}
int nvmlDeviceGetAttributes_v2(void *device, attributes_t *attributes) {
    PLAN(device);
    instance_t *instance = instance_of(device);
    if (!instance) return NOT_SUPPORTED;
    memset(attributes, 0, sizeof *attributes);
    attributes->gi_slices = (uint32_t)instance->gi_slices;
    attributes->ci_slices = (uint32_t)instance->ci_slices;
    attributes->memory = (uint64_t)instance->memory;
    return OK;
}
int nvmlDeviceGetGpuInstanceId(void *device, unsigned *id) { PLAN(device); *id = (unsigned)instance_of(device)->gi; return OK; }
int nvmlDeviceGetComputeInstanceId(void *device, unsigned *id) { PLAN(device); *id = (unsigned)instance_of(device)->ci; return OK; }
int nvmlDeviceGetGpuInstanceById(void *device, unsigned id, void **instance) {
    PLAN(device);
    *instance = (void *)(uintptr_t)(0x4000 + gpu_of(device) * 64 + (int)id);
    return OK;
}
int nvmlGpuInstanceGetInfo(void *handle, gi_info_t *info) {
    int gpu = gpu_of(handle), gi = (int)((uintptr_t)handle - 0x4000) % 64;
    for (int i = 0; i < INSTANCES; i++) {
        instance_t *found = &gpus[gpu].instance[i];
        if (!found->there || found->gi != gi) continue;
        *info = (gi_info_t){NULL, (uint32_t)gi, (uint32_t)found->profile, {(unsigned)found->start, (unsigned)found->size}};
        return OK;
    }
    return NOT_FOUND;
}
int nvmlDeviceGetRemappedRows(void *device, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failure) {
    PLAN(device);
    *corrected = *uncorrected = 0;
    *pending = (unsigned)gpus[gpu_of(device)].row_pending;
    *failure = (unsigned)gpus[gpu_of(device)].row_failure;
    return OK;
}
int nvmlDeviceGetRetiredPagesPendingStatus(void *device, unsigned *pending) { PLAN(device); (void)pending; return NOT_SUPPORTED; }
int nvmlDeviceGetTotalEccErrors(void *device, unsigned type, unsigned counter, uint64_t *count) {
    PLAN(device);
    *count = type == 1 && counter == 0 ? (uint64_t)gpus[gpu_of(device)].ecc : 0;
    return OK;
}
int nvmlDeviceGetMemoryErrorCounter(void *device, unsigned type, unsigned counter, unsigned location, uint64_t *count) {
    PLAN(device);
    (void)type, (void)counter, (void)location;
    *count = instance_of(device) ? (uint64_t)instance_of(device)->sram : 0;
    return OK;
}
static int list(void *device, char kind, unsigned *count, process_t *out) {
    unsigned found = 0, room = *count;
    for (int i = 0; i < use_count; i++) {
        if (uses[i].gpu != gpu_of(device) || uses[i].mig != mig_of(device) || uses[i].kind != kind) continue;
        if (out && found < room) out[found] = (process_t){(uint32_t)uses[i].pid, (uint64_t)uses[i].memory << 20, 0, 0};
        found++;
    }
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : OK;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, process_t *out) { PLAN(device); return list(device, 'c', count, out); }
int nvmlDeviceGetComputeRunningProcesses_v2(void *device, unsigned *count, process_t *out) { PLAN(device); return list(device, 'c', count, out); }
int nvmlDeviceGetGraphicsRunningProcesses_v3(void *device, unsigned *count, process_t *out) { PLAN(device); return list(device, 'g', count, out); }
int nvmlDeviceGetTopologyCommonAncestor(void *one, void *other, unsigned *level) {
    PLAN(one);
    PLAN(other);
    *level = (unsigned)gpus[gpu_of(one)].level[gpu_of(other)];
    return OK;
}
int nvmlDeviceGetNvLinkState(void *device, unsigned link, unsigned *active) {
    PLAN(device);
    if ((int)link >= gpus[gpu_of(device)].nvlinks) return INVALID_ARGUMENT;
    *active = 1;
    return OK;
}
int nvmlDeviceGetNvLinkRemoteDeviceType(void *device, unsigned link, unsigned *type) {
    PLAN(device);
    *type = gpus[gpu_of(device)].nvlink_to[link] < 0 ? 2 : 0;
    return OK;
}
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void *device, unsigned link, pci_t *info) {
    PLAN(device);
    return pci((void *)(uintptr_t)(0x1000 + gpus[gpu_of(device)].nvlink_to[link]), info);
}
