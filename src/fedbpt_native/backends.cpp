#include "backends.h"

#ifdef GGML_BACKEND_DL
#include <dlfcn.h>

#include <filesystem>
#include <stdexcept>
#include <string>
#endif

#include <mutex>

#include "errors.h"
#include "llama.h"
#include "log.h"

namespace fedbpt {

namespace {

bool is_gpu(ggml_backend_dev_t device) {
    const auto type = ggml_backend_dev_type(device);
    return type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU;
}

std::vector<ggml_backend_dev_t> gpu_devices() {
    std::vector<ggml_backend_dev_t> found;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t device = ggml_backend_dev_get(i);
        if (is_gpu(device)) {
            found.push_back(device);
        }
    }
    return found;
}

#ifdef GGML_BACKEND_DL
void load_libraries() {
    Dl_info self{};
    dladdr(reinterpret_cast<const void *>(&start_backends), &self);
    const std::string folder = std::filesystem::absolute(self.dli_fname).parent_path().string();

    ggml_backend_load_all_from_path(folder.c_str());
    if (cpu_device() == nullptr) {
        throw std::runtime_error(
            "no CPU backend in " + folder +
            " supports this CPU: build fedbpt on this machine (pip install --no-binary fedbpt fedbpt)");
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

std::vector<Gpu> gpus() {
    start_backends();
    std::vector<Gpu> found;
    for (ggml_backend_dev_t device : gpu_devices()) {
        size_t free = 0, total = 0;
        ggml_backend_dev_memory(device, &free, &total);
        found.push_back({ ggml_backend_dev_name(device), ggml_backend_dev_description(device), total, free });
    }
    return found;
}

bool is_on_gpu(ggml_backend_buffer_type_t type) {
    ggml_backend_dev_t device = ggml_backend_buft_get_device(type);
    return device != nullptr && is_gpu(device) && !ggml_backend_buft_is_host(type);
}

std::vector<ggml_backend_dev_t> only_gpu(const std::string & name) {
    std::string others;
    for (ggml_backend_dev_t device : gpu_devices()) {
        if (name == ggml_backend_dev_name(device)) {
            return { device, nullptr };
        }
        others += (others.empty() ? "" : ", ") + std::string(ggml_backend_dev_name(device));
    }
    if (!name.empty()) {
        throw InputError("unknown gpu '" + name + "': choose one of " + others);
    }
    return { nullptr };
}

}  // namespace fedbpt
