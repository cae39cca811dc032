#include "backends.h"

#ifdef GGML_BACKEND_DL
#include <dlfcn.h>

#include <filesystem>
#include <stdexcept>
#include <string>
#endif

#include <mutex>

#include "llama.h"
#include "log.h"

namespace fedbpt {

namespace {

#ifdef GGML_BACKEND_DL
void load_libraries() {
    Dl_info self {};
    dladdr(reinterpret_cast<const void *>(&start_backends), &self);
    const std::string folder = std::filesystem::absolute(self.dli_fname).parent_path().string();

    ggml_backend_load_all_from_path(folder.c_str());
    if (cpu_device() == nullptr) {
        throw std::runtime_error("no CPU backend in " + folder + " runs on this CPU: build fedbpt on this machine (pip install --no-binary fedbpt fedbpt)");
    }
}
#endif

}  // namespace

void start_backends() {
    static std::once_flag once;
    std::call_once(once, [] {
        install_log();
#ifdef GGML_BACKEND_DL
        load_libraries();
#endif
        llama_backend_init();
    });
}

ggml_backend_dev_t cpu_device() {
    return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

}  // namespace fedbpt
