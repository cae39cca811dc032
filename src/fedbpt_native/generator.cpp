#include "generator.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>

#include "errors.h"
#include "llama-soft-prompt.h"
#include "log_sum_exp.h"
#include "sequences.h"

namespace fedbpt {

namespace {

constexpr size_t kHeads = 7;   // slots for heads; each sequence takes two buffers of n_vocab numbers
constexpr size_t kRoom = 256;  // free cells for generated tokens, and the unit that the context grows by

std::vector<std::pair<llama_token, float>> likeliest(const float * logits, size_t n_vocab, double log_sum, size_t n) {
    std::vector<llama_token> order(n_vocab);
    std::iota(order.begin(), order.end(), 0);
    n = std::min(n, n_vocab);
    std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(n), order.end(),
                      [&](llama_token a, llama_token b) { return logits[a] > logits[b]; });

    std::vector<std::pair<llama_token, float>> found;
    for (size_t i = 0; i < n; ++i) {
        found.emplace_back(order[i], static_cast<float>(logits[order[i]] - log_sum));
    }
    return found;
}

}  // namespace

Generator::Generator(std::shared_ptr<const Model> model, int32_t n_threads, ggml_type kv_type)
    : model_(model),
      session_(std::move(model), n_threads, kv_type),
      sequences_(kTexts + kHeads) {
    for (size_t i = 0; i < sequences_.size(); ++i) {
        sequences_[i].id = kPadSeq + 1 + static_cast<llama_seq_id>(i);
        sequences_[i].is_head = i >= kTexts;
    }
}

void Generator::validate(const Input & input, const Sampling & sampling) const {
    const size_t n_embd = static_cast<size_t>(model_->n_embd());
    const size_t n_rows = input.n_places(n_embd);
    const int32_t n_layer = llama_model_n_layer(model_->get());
    const ShiftedLayers & shifted = input.shifted;
    if (shifted.n > 0 && (shifted.first < 0 || shifted.first + shifted.n > n_layer ||
                          input.rows.size() != static_cast<size_t>(shifted.n) * n_embd)) {
        throw InputError("rows must have one row for each of " + std::to_string(shifted.n) + " layers of " +
                         std::to_string(n_layer) + ", got " + std::to_string(input.rows.size() / n_embd));
    }
    if (input.ids.empty()) {
        throw InputError("ids is empty: give at least one token");
    }
    for (const llama_token id : input.ids) {
        model_->check_token(id, "token id");
    }
    if (n_rows > input.ids.size() || input.rows_at > input.ids.size() - n_rows) {
        throw InputError(std::to_string(n_rows) + " rows from token " + std::to_string(input.rows_at) +
                         " on must lie within the text's " + std::to_string(input.ids.size()) + " tokens");
    }
    if (!std::all_of(input.rows.begin(), input.rows.end(), [](float x) { return std::isfinite(x); })) {
        throw InputError("rows must be finite, got NaN or infinity");
    }
    if (input.ids.size() >= static_cast<size_t>(model_->n_ctx_train())) {
        throw InputError("the text with its prompt has " + std::to_string(input.ids.size()) +
                         " tokens, too many for the model's context of " + std::to_string(model_->n_ctx_train()) +
                         ": shorten the text");
    }
    check_sampling(sampling);
}

const float * Generator::row_of(const Input & input, size_t i) const {
    const size_t n_embd = static_cast<size_t>(model_->n_embd());
    const bool later = input.shifted.continued && !input.rows.empty();
    const bool inside = i >= input.rows_at && (later || i < input.rows_at + input.n_places(n_embd));
    if (!inside) {
        return nullptr;
    }
    return input.rows.data() + (input.shifted.n > 0 ? 0 : (i - input.rows_at) * n_embd);
}

// Length of the common prefix: equal tokens with equal shifts, or equal rows in their place.
size_t Generator::common(const Input & a, const Input & b) const {
    const size_t n = std::min(a.ids.size(), b.ids.size());
    size_t i = 0;
    for (; i < n; ++i) {
        const float * row_a = row_of(a, i);
        const float * row_b = row_of(b, i);
        if ((row_a == nullptr) != (row_b == nullptr)) {
            break;
        }
        const size_t n_same = a.shifted.n > 0 ? a.rows.size() : static_cast<size_t>(model_->n_embd());
        const bool replaced = row_a != nullptr && a.shifted.n == 0;  // the token id does not matter
        if ((!replaced && a.ids[i] != b.ids[i]) ||
            (row_a != nullptr &&
             (!(a.shifted == b.shifted) || std::memcmp(row_a, row_b, n_same * sizeof(float)) != 0))) {
            break;
        }
    }
    return i;
}

// The least recently used sequence that is not live, or null.
Generator::Sequence * Generator::oldest(bool is_head) {
    Sequence * found = nullptr;
    for (Sequence & sequence : sequences_) {
        if (sequence.is_head == is_head && !sequence.is_live() &&
            (found == nullptr || sequence.last_used < found->last_used)) {
            found = &sequence;
        }
    }
    return found;
}

// A sequence for a new text: the one whose KV is the beginning of it, as of a text that goes on, or the oldest.
Generator::Sequence * Generator::place_for(const Input & input) {
    Sequence * found = nullptr;
    for (Sequence & sequence : sequences_) {
        if (!sequence.is_head && !sequence.is_live() && sequence.n_computed > 0 &&
            (found == nullptr || sequence.n_computed > found->n_computed) &&
            common(sequence.input, input) >= sequence.n_computed) {
            found = &sequence;
        }
    }
    return found != nullptr ? found : oldest(/*is_head =*/false);
}

size_t Generator::live_cells() const {
    size_t n = 0;
    for (const Sequence & sequence : sequences_) {
        n += sequence.is_live() ? sequence.n_computed : 0;
    }
    return n;
}

void Generator::drop(Sequence & sequence) {
    if (session_.is_open()) {
        llama_memory_seq_rm(session_.memory(), sequence.id, -1, -1);
    }
    sequence.input = {};
    sequence.n_computed = 0;
}

// Assigns `input` to the sequence, with the KV of its longest prefix that is computed already, in any sequence. Returns
// the length of that prefix.
size_t Generator::adopt(Sequence & sequence, Input input) {
    const Sequence * best = nullptr;
    size_t most = 0;
    for (const Sequence & other : sequences_) {
        const size_t n = std::min(
            { common(other.input, input), other.n_computed, input.ids.size() - 1 });  // the last one yields the logits
        if (n > most && other.is_long == is_long(input)) {
            best = &other;
            most = n;
        }
    }
    if (best == &sequence) {
        llama_memory_seq_rm(session_.memory(), sequence.id, static_cast<llama_pos>(most), -1);
    } else {
        drop(sequence);
        if (best != nullptr) {
            llama_memory_seq_cp(session_.memory(), best->id, sequence.id, 0, static_cast<llama_pos>(most));
        }
    }
    sequence.is_long = is_long(input);
    sequence.input = std::move(input);
    sequence.n_computed = most;
    return most;
}

// Stores the KV up to the end of the rows as a head, if tokens follow the rows.
void Generator::keep_head(const Sequence & sequence) {
    const Input & input = sequence.input;
    const size_t n = input.rows_at + input.n_places(static_cast<size_t>(model_->n_embd()));
    if (input.rows.empty() || n >= sequence.n_computed) {
        return;
    }
    for (Sequence & head : sequences_) {
        if (head.is_head && head.n_computed == n && head.is_long == sequence.is_long &&
            common(head.input, input) == n) {
            head.last_used = ++clock_;
            return;
        }
    }
    Sequence & head = *oldest(/*is_head =*/true);
    drop(head);
    head.input = { { input.ids.begin(), input.ids.begin() + static_cast<std::ptrdiff_t>(n) },
                   input.rows,
                   input.rows_at,
                   input.shifted };
    head.n_computed = n;
    head.is_long = sequence.is_long;
    head.last_used = ++clock_;
    llama_memory_seq_cp(session_.memory(), sequence.id, head.id, 0, static_cast<llama_pos>(n));
}

// Drops the least recently used text that is not being generated; false if there is none.
bool Generator::evict() {
    Sequence * found = nullptr;
    for (Sequence & sequence : sequences_) {
        if (!sequence.is_head && !sequence.is_live() && sequence.n_computed > 0 &&
            (found == nullptr || sequence.last_used < found->last_used)) {
            found = &sequence;
        }
    }
    if (found != nullptr) {
        drop(*found);
    }
    return found != nullptr;
}

void Generator::ensure_context(size_t n_cells) {
    if (session_.n_cells() < n_cells) {
        grow(n_cells + kRoom);
    }
}

// Replaces the context by one of at least n_cells cells, keeping the KV of the texts being generated.
void Generator::grow(size_t n_cells) {
    n_cells = std::max(n_cells, live_cells() + kRoom);  // restored, texts share no cells
    std::vector<std::pair<Sequence *, std::vector<uint8_t>>> saved;
    for (Sequence & sequence : sequences_) {
        if (sequence.is_live() && sequence.n_computed > 0) {
            saved.emplace_back(&sequence, session_.save(sequence.id));
        }
        sequence.n_computed = 0;
    }
    const auto size = static_cast<uint32_t>((n_cells + kRoom - 1) / kRoom * kRoom);
    const uint32_t n_seqs = 1 + kTexts + kHeads;
    session_.close();
    session_.open({ size, n_seqs, /*n_outputs =*/n_seqs }, {}, "free memory, or generate shorter texts");
    n_cells_ = session_.n_cells();

    for (auto & [sequence, state] : saved) {
        session_.restore(state, sequence->id);
        sequence->n_computed = static_cast<size_t>(llama_memory_seq_pos_max(session_.memory(), sequence->id)) + 1;
    }
}

std::unique_ptr<Generator::Stream> Generator::open(Input input, const Sampling & sampling, const std::string & grammar,
                                                   size_t n_said) {
    validate(input, sampling);
    auto stream = std::make_unique<Stream>();
    stream->generator_ = this;
    stream->sampler_ = make_sampler(sampling);
    if (!grammar.empty()) {
        stream->grammar_.emplace(llama_model_get_vocab(model_->get()), grammar);
        stream->grammar_->follow(input.ids.data() + input.ids.size() - std::min(n_said, input.ids.size()),
                                 std::min(n_said, input.ids.size()));
    }

    std::lock_guard<std::mutex> lock(mutex_);
    Sequence * sequence = place_for(input);
    if (sequence == nullptr) {
        throw InputError(std::to_string(kTexts) + " texts are being generated, which is the limit: close one first");
    }
    ensure_context(input.ids.size() + kRoom);
    stream->n_reused_ = adopt(*sequence, std::move(input));
    stream->sequence_ = sequence;
    sequence->owner = stream->alive_;
    sequence->last_used = ++clock_;
    return stream;
}

void Generator::check_own(const Stream & stream) const {
    if (stream.generator_ != this) {
        throw InputError("this text was opened by another generator: continue it with that one");
    }
}

// Forgets that the last token of the text is computed, if an error came before one was chosen by its logits.
void Generator::uncompute_last(Sequence & sequence) {
    const size_t end = sequence.input.ids.size() - 1;
    if (sequence.n_computed > end) {
        sequence.n_computed = end;
        llama_memory_seq_rm(session_.memory(), sequence.id, static_cast<llama_pos>(end), -1);
    }
}

Choice Generator::next(Stream & stream, size_t n_likeliest, const std::function<bool()> & stop) {
    check_own(stream);
    std::lock_guard<std::mutex> lock(mutex_);
    Sequence & sequence = *stream.sequence_;
    if (sequence.input.ids.size() > static_cast<size_t>(model_->n_ctx_train())) {
        throw InputError("the model's context of " + std::to_string(model_->n_ctx_train()) +
                         " tokens is full: generate fewer tokens");
    }

    const Session::Watch watch(session_, stream.cancelled_, stop);

    ensure_context(sequence.input.ids.size());
    uncompute_last(sequence);
    read_up_to(sequence, sequence.input.ids.size());
    const Choice found = choose(stream, -1, n_likeliest);
    if (found.id == Choice::kNotFinite) {
        reset();
        throw InputError(
            "the model's logits are not finite: use a soft prompt with smaller numbers, or fetch the model again");
    }
    if (found.id == Choice::kNoToken) {
        throw InputError("no token of this model continues the text as its grammar demands: use another grammar");
    }
    return found;
}

std::vector<Choice> Generator::next_all(const std::vector<Stream *> & streams, const std::vector<size_t> & n_likeliest,
                                        const std::function<bool()> & stop) {
    for (const Stream * stream : streams) {
        check_own(*stream);
    }
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<Choice> found(streams.size(), Choice{ Choice::kCancelled, 0.0f, {} });
    std::vector<bool> long_ones;
    for (size_t i = 0; i < streams.size(); ++i) {
        if (std::find(streams.begin(), streams.begin() + static_cast<std::ptrdiff_t>(i), streams[i]) !=
            streams.begin() + static_cast<std::ptrdiff_t>(i)) {
            throw InputError("a stream is given twice: give each once");
        }
        const Input & input = streams[i]->sequence_->input;
        long_ones.push_back(is_long(input));
        if (input.ids.size() > static_cast<size_t>(model_->n_ctx_train())) {
            found[i].id = Choice::kFull;
        }
    }
    for (const bool is_long : { false, true }) {  // LongRoPE's factors are those of the whole pass
        std::vector<Stream *> together;
        std::vector<size_t> of;
        // Reading one text may drop the KV of another: where memory is short, or where the reading is interrupted.
        do {
            together.clear();
            of.clear();
            for (size_t i = 0; i < streams.size(); ++i) {
                if (long_ones[i] == is_long && found[i].id != Choice::kFull && read(*streams[i], stop)) {
                    together.push_back(streams[i]);
                    of.push_back(i);
                }
            }
        } while (!std::all_of(together.begin(), together.end(), [](const Stream * each) {
            return each->sequence_->n_computed + 1 == each->sequence_->input.ids.size();
        }));
        if (together.empty()) {
            continue;
        }
        const std::atomic<bool> never{ false };
        const Session::Watch watch(session_, never, stop);
        while (!compute_last(together)) {}
        session_.remove_padding();
        bool all_finite = true;
        for (size_t i = 0; i < together.size(); ++i) {
            all_finite = all_finite && is_finite(static_cast<int32_t>(i));
        }
        if (!all_finite) {  // what is infinite in one text's KV makes the others' attention NaN: each by itself
            reset();
        }
        for (size_t i = 0; i < together.size(); ++i) {
            Sequence & sequence = *together[i]->sequence_;
            if (!all_finite) {
                read_up_to(sequence, sequence.input.ids.size());
            }
            found[of[i]] = choose(*together[i], all_finite ? static_cast<int32_t>(i) : -1, n_likeliest[of[i]]);
            if (found[of[i]].id == Choice::kNotFinite) {
                reset();
            }
        }
    }
    return found;
}

// Chooses the token after `stream`'s text by the logits of output `output`, and appends it.
Choice Generator::choose(Stream & stream, int32_t output, size_t n_likeliest) {
    Sequence & sequence = *stream.sequence_;
    const float * logits = llama_get_logits_ith(session_.context(), output);
    const auto n_vocab = static_cast<size_t>(model_->n_vocab());
    const double log_sum = log_sum_exp(logits, n_vocab);
    if (!std::isfinite(log_sum)) {
        return { Choice::kNotFinite, 0.0f, {} };
    }
    keep_head(sequence);

    const llama_token id = stream.grammar_ ? stream.grammar_->sample(stream.sampler_.get(), logits, n_vocab)
                                           : llama_sampler_sample(stream.sampler_.get(), session_.context(), output);
    if (id < 0) {  // its logits will be those of another pass
        uncompute_last(sequence);
        return { id, 0.0f, {} };
    }
    sequence.input.ids.push_back(id);
    sequence.last_used = ++clock_;
    return { id, static_cast<float>(logits[id] - log_sum),
             n_likeliest > 0 ? likeliest(logits, n_vocab, log_sum, n_likeliest)
                             : std::vector<std::pair<llama_token, float>>() };
}

bool Generator::is_finite(int32_t output) const {
    const float * logits = llama_get_logits_ith(session_.context(), output);
    return std::isfinite(log_sum_exp(logits, static_cast<size_t>(model_->n_vocab())));
}

// Computes the text but for its last token. False if its stream was cancelled.
bool Generator::read(Stream & stream, const std::function<bool()> & stop) {
    constexpr size_t kPart = Session::kUbatch;
    Sequence & sequence = *stream.sequence_;
    if (stream.cancelled_) {
        return false;
    }
    // Not interrupted by its own cancelling, which would clear the KV of all texts, but ended between two parts.
    const std::atomic<bool> never{ false };
    const Session::Watch watch(session_, never, stop);
    const size_t end = sequence.input.ids.size() - 1;
    ensure_context(end + 1);
    uncompute_last(sequence);
    do {  // once at least: the text may have outgrown LongRoPE's short factors
        read_up_to(sequence, std::min(end, sequence.n_computed + kPart));
    } while (sequence.n_computed < end && !stream.cancelled_);
    return !stream.cancelled_;
}

// Computes the last tokens of texts in one pass; their logits are the outputs, in order. False: again, as the cache was
// full and has room now.
bool Generator::compute_last(const std::vector<Stream *> & streams) {
    batch_.clear();
    for (const Stream * stream : streams) {
        const Sequence & sequence = *stream->sequence_;
        const size_t i = sequence.input.ids.size() - 1;
        batch_.add(sequence.input.ids[i], static_cast<llama_pos>(i), sequence.id, 0);
        if (row_of(sequence.input, i) != nullptr) {
            set_rows(sequence);
        }
    }
    Session::pad(batch_, /*outputs =*/true);
    if (!decode(streams.front()->sequence_->is_long)) {
        return false;
    }
    n_tokens_ += streams.size();
    for (const Stream * stream : streams) {
        stream->sequence_->n_computed = stream->sequence_->input.ids.size();
    }
    return true;
}

// Lets the next pass replace embeddings by the sequence's rows, or add them to layers' outputs.
void Generator::set_rows(const Sequence & sequence) {
    const Input & input = sequence.input;
    const auto at = static_cast<llama_pos>(input.rows_at);
    if (input.shifted.n > 0) {
        llama_soft_prompt_set_shift(session_.context(), sequence.id, at,
                                    input.shifted.continued ? std::numeric_limits<llama_pos>::max() : at + 1,
                                    input.shifted.first, input.shifted.n, input.rows.data());
    } else {
        const size_t n_rows = input.rows.size() / static_cast<size_t>(model_->n_embd());
        llama_soft_prompt_set(session_.context(), sequence.id, at, static_cast<int32_t>(n_rows), input.rows.data());
    }
}

void Generator::read_up_to(Sequence & sequence, size_t end) {
    if (sequence.is_long != is_long(sequence.input)) {  // the text outgrew LongRoPE's short factors
        llama_memory_seq_rm(session_.memory(), sequence.id, -1, -1);
        sequence.n_computed = 0;
        sequence.is_long = is_long(sequence.input);
    }
    while (sequence.n_computed < end) {
        compute_part(sequence, std::min(end, sequence.n_computed + Session::kBatch));
    }
}

void Generator::compute_part(Sequence & sequence, size_t end) {
    const Input & input = sequence.input;

    batch_.clear();
    bool any_row = false;
    for (size_t i = sequence.n_computed; i < end; ++i) {
        any_row = any_row || row_of(input, i) != nullptr;
        batch_.add(input.ids[i], static_cast<llama_pos>(i), sequence.id, i + 1 == input.ids.size() ? 0 : Batch::kNone);
    }
    if (batch_.size() > 1) {
        Session::pad(batch_, /*outputs =*/false);
    }
    session_.check_stop();  // before the computation, as interrupting that would clear the KV of all texts
    if (any_row) {
        set_rows(sequence);
    }
    if (!decode(sequence.is_long)) {
        return;
    }
    session_.remove_padding();
    n_tokens_ += end - sequence.n_computed;
    sequence.n_computed = end;
}

// Computes the batch. False: again, as the cache was full and has room now.
bool Generator::decode(bool is_long) {
    llama_soft_prompt_set_text_length(session_.context(), model_->rope_length(is_long));
    bool fits = false;
    try {
        fits = session_.decode(batch_, 0, batch_.size());
    } catch (...) {
        reset();
        throw;
    }
    const bool shifted = llama_soft_prompt_shifted(session_.context());
    llama_soft_prompt_clear(session_.context());
    if (!shifted) {
        reset();
        throw UnsupportedModelError(kNoShifts);
    }
    if (!fits) {
        if (!evict()) {
            grow(session_.n_cells() + std::max<size_t>(kRoom, batch_.size()));
        }
        return false;
    }
    return true;
}

void Generator::reset() {
    session_.clear();
    for (Sequence & sequence : sequences_) {
        sequence.n_computed = 0;
    }
}

}  // namespace fedbpt
