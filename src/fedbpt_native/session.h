#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>

#include "batch.h"
#include "handles.h"
#include "model.h"

namespace fedbpt {

// The next multiple of `unit`.
inline size_t padded(size_t n, size_t unit) {
    return (n + unit - 1) / unit * unit;
}

// A llama.cpp context and its compute threads: the common part of the scorer and the generator.
// Not thread-safe: its owner holds a lock.
class Session {
public:
    static constexpr uint32_t kUbatch = 512;  // tokens per graph
    static constexpr uint32_t kBatch = 2048;  // tokens per llama_decode
    static constexpr size_t kPad = 4;  // CPU kernels process four rows at a time, and round a remainder differently

    // kv_type: GGML_TYPE_F16 or GGML_TYPE_Q8_0; f32 models always have an f32 KV cache. Throws InputError.
    Session(std::shared_ptr<const Model> model, int32_t n_threads, ggml_type kv_type);

    struct Size {
        uint32_t n_cells;
        uint32_t n_seqs;
        uint32_t n_outputs;  // per llama_decode; each is n_vocab wide without a label head
    };
    struct Labels {  // see llama_soft_prompt_set_labels
        const llama_token * ids = nullptr;
        int32_t n = 0;
        const float * head = nullptr;
    };
    // Replaces the context. Throws std::runtime_error if memory is short; `advice` ends its message.
    void open(const Size & size, const Labels & labels, const char * advice);
    void close() { ctx_.reset(); }

    bool is_open() const { return ctx_ != nullptr; }
    llama_context * context() const { return ctx_.get(); }
    llama_memory_t memory() const { return llama_get_memory(ctx_.get()); }
    uint32_t n_cells() const { return is_open() ? llama_n_ctx(ctx_.get()) : 0; }
    const Model & model() const { return *model_; }
    int32_t n_threads() const { return n_threads_; }

    // While it exists, computation is interrupted when `cancelled` is set or `stop` returns true. `stop` is polled
    // every few milliseconds, on the calling thread.
    class Watch {
    public:
        Watch(Session & session, const std::atomic<bool> & cancelled, const std::function<bool()> & stop);
        ~Watch();
        Watch(const Watch &) = delete;
        Watch & operator=(const Watch &) = delete;

    private:
        Session & session_;
    };

    // Pads the batch with tokens of kPadSeq to a multiple of kPad tokens and, if `outputs`, of outputs.
    static void pad(Batch & batch, bool outputs);
    void remove_padding();

    // Throws ScoringInterrupted if the computation was interrupted.
    void check_stop();

    // Runs llama_decode on the batch's tokens [begin, end). False: not enough free KV cells.
    // Throws ScoringInterrupted; std::runtime_error if llama.cpp fails.
    bool decode(Batch & batch, size_t begin, size_t end);

    // Clears the KV cache including its data: NaN or infinity left by an interrupted or overflowing pass must not reach
    // a later one, not even multiplied by zero.
    void clear();

    // Copy the KV of one sequence out of the cache, and back.
    std::vector<uint8_t> save(llama_seq_id seq) const;
    void restore(const std::vector<uint8_t> & state, llama_seq_id seq);

private:
    static bool on_abort(void * self);
    bool wants_to_stop();

    std::shared_ptr<const Model> model_;
    const int32_t n_threads_;
    const ggml_type kv_type_;
    ThreadpoolPtr threadpool_;
    ContextPtr ctx_;

    const std::atomic<bool> * cancelled_ = nullptr;
    const std::function<bool()> * stop_ = nullptr;
    bool stopped_ = false;
    std::chrono::steady_clock::time_point next_stop_check_;
};

}  // namespace fedbpt
