/* A libcuda.so.1 for machines without a GPU: what Triton's driver calls, as far as it calls it, with a device that loads
   nothing and runs nothing. It notes the last launch, for test_launcher.py. Every function returns CUDA_SUCCESS. */

#include <string.h>

unsigned long long noted[512]; /* the first 8 bytes of each parameter */
int parameters;                /* how many to note, which only the kernel knows */
int launches;
unsigned grid[3];

int cuLaunchKernelEx(const unsigned *config, void *function, void **values, void **extra) {
    launches++;
    memcpy(grid, config, sizeof grid);
    for (int i = 0; i < parameters; i++)
        memcpy(&noted[i], values[i], sizeof noted[i]);
    return 0;
}

int cuPointerGetAttribute(void *data, int attribute, unsigned long long pointer) {
    memcpy(data, &pointer, sizeof pointer); /* the device's pointer is the host's */
    return 0;
}

static int give_int(int *value, int given) { return *value = given, 0; }
static int give_pointer(void **value) { return *value = (void *)1, 0; }

int cuCtxGetDevice(int *device) { return give_int(device, 0); }
int cuDeviceGet(int *device, int number) { return give_int(device, number); }
int cuDeviceGetAttribute(int *value, int attribute, int device) { return give_int(value, 232448); }
/* Attribute 0 is the number of threads that a block may have. */
int cuFuncGetAttribute(int *value, int attribute, void *function) { return give_int(value, attribute ? 0 : 1024); }
int cuDriverGetVersion(int *version) { return give_int(version, 13000); }
int cuOccupancyMaxActiveClusters(int *count, void *function, void *config) { return give_int(count, 1); }
int cuCtxGetCurrent(void **context) { return give_pointer(context); }
int cuDevicePrimaryCtxRetain(void **context, int device) { return give_pointer(context); }
int cuModuleLoadData(void **module, void *image) { return give_pointer(module); }
int cuModuleGetFunction(void **function, void *module, char *name) { return give_pointer(function); }
int cuGetErrorString(int error, char **text) { return *text = "an error", 0; }
int cuCtxGetLimit(unsigned long *value, int limit) { return *value = 0, 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxSetLimit(int limit, unsigned long value) { return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuModuleUnload(void *module) { return 0; }
int cuPointerGetAttributes(unsigned count, void *attributes, void **data, unsigned long long pointer) { return 0; }
int cuStreamIsCapturing(void *stream, int *status) { return give_int(status, 0); }
int cuTensorMapEncodeTiled(void) { return 0; }
int cuTensorMapEncodeIm2col(void) { return 0; }
