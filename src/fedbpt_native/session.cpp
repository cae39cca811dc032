#include "session.h"

#include <new>
#include <string>

#include "backends.h"
#include "errors.h"
#include "llama-soft-prompt.h"
#include "log.h"
#include "sequences.h"

namespace fedbpt {

namespace {

constexpr auto kStopInterval = std::chrono::milliseconds(20);

}  // namespace

Session::Session(std::shared_ptr<const Model> model, int32_t n_threads, ggml_type kv_type)
    : model_(std::move(model)),
      n_threads_(n_threads),
      kv_type_(model_->is_f32() ? GGML_TYPE_F32 : kv_type) {
    if (n_threads < 1 || n_threads > GGML_MAX_N_THREADS) {
        throw InputError("n_threads must be from 1 to " + std::to_string(GGML_MAX_N_THREADS) + ", got " +
                         std::to_string(n_threads));
    }
    if (kv_type_ == GGML_TYPE_Q8_0 && !model_->fits_kv(kv_type_)) {
        throw InputError(
            "kv_type q8_0 has blocks of 32 numbers, which do not divide this model's attention heads: use f16");
    }
    ggml_threadpool_params params = ggml_threadpool_params_default(n_threads);
    threadpool_.reset(cpu_function<decltype(ggml_threadpool_new)>("ggml_threadpool_new")(&params));
    if (!threadpool_) {
        throw std::bad_alloc();
    }
}

void Session::open(const Size & size, const Labels & labels, const char * advice) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = size.n_cells;
    params.n_batch = kBatch;
    params.n_ubatch = kUbatch;
    params.n_seq_max = size.n_seqs;
    params.n_outputs_max = size.n_outputs;
    params.n_threads = n_threads_;
    params.n_threads_batch = n_threads_;
    params.kv_unified = true;
    params.swa_full = true;
    params.type_k = kv_type_;
    params.type_v = kv_type_;
    if (kv_type_ == GGML_TYPE_F32) {
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;  // it would cast the KV to f16
    } else if (kv_type_ != GGML_TYPE_F16) {
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;  // only flash attention reads quantised KV
    }
    params.abort_callback = on_abort;
    params.abort_callback_data = this;

    ctx_.reset();  // before the new one is made: there may be no memory for both
    take_error();
    ctx_.reset(llama_soft_prompt_init_from_model(model_->get(), params, labels.ids, labels.n, labels.head));
    if (!ctx_) {
        throw std::runtime_error("cannot create a context of " + std::to_string(size.n_cells) + " tokens (" +
                                 take_error() + "): " + advice);
    }
    llama_attach_threadpool(ctx_.get(), threadpool_.get(), threadpool_.get());
}

Session::Watch::Watch(Session & session, const std::atomic<bool> & cancelled, const std::function<bool()> & stop)
    : session_(session) {
    session.cancelled_ = &cancelled;
    session.stop_ = &stop;
    session.stopped_ = false;
}

Session::Watch::~Watch() {
    session_.cancelled_ = nullptr;
    session_.stop_ = nullptr;
}

void Session::pad(Batch & batch, bool outputs) {
    const auto lacks_output = [&] { return outputs && batch.n_outputs() % kPad != 0; };
    for (llama_pos pos = 0; batch.size() % kPad != 0 || lacks_output(); ++pos) {
        batch.add(/*token =*/0, pos, kPadSeq, lacks_output() ? Batch::kUnread : Batch::kNone);
    }
}

void Session::remove_padding() {
    llama_memory_seq_rm(memory(), kPadSeq, -1, -1);
}

void Session::check_stop() {
    next_stop_check_ = {};  // check now: a small model computes many batches per interval
    if (wants_to_stop()) {
        throw ScoringInterrupted("the computation was interrupted");
    }
}

bool Session::decode(Batch & batch, size_t begin, size_t end) {
    check_stop();
    take_error();
    const int32_t status = llama_decode(ctx_.get(), batch.view(begin, end));
    if (status == 2) {
        throw ScoringInterrupted("the computation was interrupted");
    }
    if (status != 0 && status != 1) {
        throw std::runtime_error("llama_decode failed with status " + std::to_string(status) + " (" + take_error() +
                                 "): please report this");
    }
    return status == 0;
}

void Session::clear() {
    llama_memory_clear(memory(), /*data =*/true);
    llama_soft_prompt_clear(ctx_.get());
}

std::vector<uint8_t> Session::save(llama_seq_id seq) const {
    std::vector<uint8_t> state(llama_state_seq_get_size(ctx_.get(), seq));
    state.resize(llama_state_seq_get_data(ctx_.get(), state.data(), state.size(), seq));
    return state;
}

void Session::restore(const std::vector<uint8_t> & state, llama_seq_id seq) {
    if (llama_state_seq_set_data(ctx_.get(), state.data(), state.size(), seq) == 0) {
        throw std::runtime_error("the KV of a text could not be restored (" + take_error() + "): please report this");
    }
}

bool Session::on_abort(void * self) {
    return static_cast<Session *>(self)->wants_to_stop();
}

bool Session::wants_to_stop() {
    if (stopped_ || (cancelled_ != nullptr && *cancelled_)) {
        return true;
    }
    if (stop_ == nullptr || !*stop_) {
        return false;
    }
    const auto now = std::chrono::steady_clock::now();
    if (now < next_stop_check_) {
        return false;
    }
    next_stop_check_ = now + kStopInterval;
    stopped_ = (*stop_)();
    return stopped_;
}

}  // namespace fedbpt
