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

// A llama.cpp context and the threads that compute in it: what the scorer and the generator share.
// Not thread-safe: its owner holds a lock.
class Session {
public:
    static constexpr uint32_t kUbatch = 512;  // tokens a graph
    static constexpr uint32_t kBatch = 2048;  // tokens a llama_decode
    static constexpr size_t kPad = 4;         // CPU kernels take rows by four, and round the rest differently

    // kv_type: of the KV cache, GGML_TYPE_F16 or GGML_TYPE_Q8_0; models of f32 have it in f32. Throws InputError.
    Session(std::shared_ptr<const Model> model, int32_t n_threads, ggml_type kv_type);

    struct Size {
        uint32_t n_cells;
        uint32_t n_seqs;
        uint32_t n_outputs;  // of one llama_decode, n_vocab wide each where there is no label head
    };
    struct Labels {  // see llama_soft_prompt_set_labels
        const llama_token * ids = nullptr;
        int32_t n = 0;
        const float * head = nullptr;
    };
    // Replaces the context. `advice` ends the message where there is no memory for it. Throws std::runtime_error.
    void open(const Size & size, const Labels & labels, const char * advice);
    void close() { ctx_.reset(); }

    bool is_open() const { return ctx_ != nullptr; }
    llama_context * context() const { return ctx_.get(); }
    llama_memory_t memory() const { return llama_get_memory(ctx_.get()); }
    uint32_t n_cells() const { return is_open() ? llama_n_ctx(ctx_.get()) : 0; }
    const Model & model() const { return *model_; }
    int32_t n_threads() const { return n_threads_; }

    // While it exists, a pass gives up once `cancelled` is set or `stop` returns true. `stop` is called every few
    // milliseconds, on the thread that computes.
    class Watch {
    public:
        Watch(Session & session, const std::atomic<bool> & cancelled, const std::function<bool()> & stop);
        ~Watch();
        Watch(const Watch &) = delete;
        Watch & operator=(const Watch &) = delete;

    private:
        Session & session_;
    };

    // Fills the batch up to a multiple of kPad tokens, and with `outputs` of outputs as well, in kPadSeq.
    static void pad(Batch & batch, bool outputs);
    void remove_padding();

    // Throws ScoringInterrupted where the pass is to be given up.
    void check_stop();

    // llama_decode of the batch's tokens [begin, end). false: no KV cells are free.
    // Throws ScoringInterrupted; std::runtime_error where llama.cpp fails.
    bool decode(Batch & batch, size_t begin, size_t end);

    // Empties the KV cache, its data too: what an interrupted or overflowing pass left must not reach a later one, not
    // even multiplied by zero.
    void clear();

    // The KV of one sequence, and back.
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
