#include "formats.h"

#include <algorithm>
#include <ctime>
#include <limits>
#include <map>

#include "backends.h"
#include "errors.h"
#include "ggml-cpp.h"
#include "handles.h"
#include "log.h"
#include "parts.h"

namespace fedbpt {

namespace {

constexpr int64_t kIn = 512;  // a multiple of every type's block
constexpr int64_t kOut = 1024;
constexpr int64_t kTokens = 64;

constexpr int kRepeatsMin = 2;
constexpr double kEnoughSeconds = 0.01;

ggml_type type_named(const std::string & name) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const auto type = static_cast<ggml_type>(i);
        // integers, and the types that activations are rounded to, cannot be unpacked
        if (ggml_type_name(type) == name &&
            (type == GGML_TYPE_F32 || ggml_get_type_traits(type)->to_float != nullptr)) {
            return type;
        }
    }
    throw InputError("'" + name + "' is not a weight type of ggml: use one such as q4_0 or f16");
}

// CPU time of this thread: on a busy machine, wall-clock time would include other threads' work.
double thread_seconds() {
    timespec now{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

ggml_context_ptr new_context() {
    return ggml_context_ptr(
        ggml_init({ 8 * ggml_tensor_overhead() + ggml_graph_overhead(), /*mem_buffer =*/nullptr, /*no_alloc =*/true }));
}

// The same choice as llama_model_loader's: the CPU's first special buffer type (repacked, AMX) with a kernel for it,
// else the plain one.
ggml_backend_buffer_type_t weight_buffer_type(ggml_backend_dev_t cpu, ggml_tensor * weight,
                                              const ggml_tensor * product) {
    const auto extra = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu), "ggml_backend_dev_get_extra_bufts"));
    for (ggml_backend_buffer_type_t * candidate = extra ? extra(cpu) : nullptr;
         candidate != nullptr && *candidate != nullptr; ++candidate) {
        const ggml_backend_buffer_ptr empty(ggml_backend_buft_alloc_buffer(*candidate, 0));
        weight->buffer = empty.get();
        const bool fits = ggml_backend_dev_supports_op(cpu, product);
        weight->buffer = nullptr;
        if (fits) {
            return *candidate;
        }
    }
    return ggml_backend_dev_buffer_type(cpu);
}

// Visits the tensors of a model, without their data, in the order of its files.
template <typename F>
void for_each_tensor(const std::string & path, const F & visit) {
    for (const std::string & part : model_parts(path)) {
        ggml_context * tensors = nullptr;
        const GgufPtr gguf(gguf_init_from_file(part.c_str(), { /*no_alloc =*/true, &tensors }));
        if (!gguf) {
            throw ModelFileError(part + " cannot be read any more: was it moved or truncated?");
        }
        const ggml_context_ptr owner(tensors);
        for (ggml_tensor * tensor = ggml_get_first_tensor(tensors); tensor != nullptr;
             tensor = ggml_get_next_tensor(tensors, tensor)) {
            visit(tensor);
        }
    }
}

}  // namespace

std::vector<WeightFormat> weight_formats(const std::string & path) {
    std::map<ggml_type, WeightFormat> found;
    for_each_tensor(path, [&](const ggml_tensor * tensor) {
        if (std::string(tensor->name).rfind("blk.", 0) == 0 && ggml_n_dims(tensor) > 1) {
            WeightFormat & format = found[tensor->type];
            format.type = ggml_type_name(tensor->type);
            format.n_params += static_cast<uint64_t>(ggml_nelements(tensor));
            format.n_bytes += ggml_nbytes(tensor);
        }
    });
    std::vector<WeightFormat> formats;
    for (const auto & [type, format] : found) {
        formats.push_back(format);
    }
    std::stable_sort(formats.begin(), formats.end(),
                     [](const WeightFormat & a, const WeightFormat & b) { return a.n_params > b.n_params; });
    return formats;
}

std::vector<TensorShape> tensor_shapes(const std::string & path) {
    std::vector<TensorShape> shapes;
    for_each_tensor(path, [&](const ggml_tensor * tensor) {
        shapes.push_back({ tensor->name, { tensor->ne, tensor->ne + ggml_n_dims(tensor) } });
    });
    return shapes;
}

double matmul_flops(const std::string & type) {
    const ggml_type weight_type = type_named(type);
    start_backends();
    const ggml_backend_dev_t cpu = cpu_device();
    const ggml_backend_ptr backend(ggml_backend_dev_init(cpu, nullptr));
    cpu_function<void(ggml_backend_t, int)>("ggml_backend_set_n_threads")(backend.get(), 1);  // the calling thread

    const ggml_context_ptr weights = new_context(), rest = new_context();
    ggml_tensor * weight = ggml_new_tensor_2d(weights.get(), weight_type, kIn, kOut);
    ggml_tensor * input = ggml_new_tensor_2d(rest.get(), GGML_TYPE_F32, kIn, kTokens);
    ggml_tensor * product = ggml_mul_mat(rest.get(), weight, input);
    ggml_cgraph * graph = ggml_new_graph_custom(rest.get(), 8, false);
    ggml_build_forward_expand(graph, product);

    const ggml_backend_buffer_ptr weight_buffer(
        ggml_backend_alloc_ctx_tensors_from_buft(weights.get(), weight_buffer_type(cpu, weight, product)));
    const ggml_backend_buffer_ptr rest_buffer(ggml_backend_alloc_ctx_tensors(rest.get(), backend.get()));
    if (!weight_buffer || !rest_buffer) {
        throw std::bad_alloc();
    }
    // zeros suffice: no kernel's time depends on the values
    const std::vector<char> zeros(std::max(ggml_nbytes(weight), ggml_nbytes(input)));
    ggml_backend_tensor_set(weight, zeros.data(), 0, ggml_nbytes(weight));
    ggml_backend_tensor_set(input, zeros.data(), 0, ggml_nbytes(input));

    double best = std::numeric_limits<double>::infinity(), total = 0.0;
    for (int i = 0; i < kRepeatsMin || total < kEnoughSeconds; ++i) {
        const double begin = thread_seconds();
        ggml_backend_graph_compute(backend.get(), graph);
        const double taken = thread_seconds() - begin;
        best = std::min(best, taken);
        total += taken;
    }
    return 2.0 * kIn * kOut * kTokens / best;
}

}  // namespace fedbpt
