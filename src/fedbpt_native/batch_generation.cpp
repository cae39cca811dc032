// Many texts continued at a time, for measures of generated text: candidates share the KV of their texts.

#include <algorithm>
#include <cmath>
#include <string>

#include "errors.h"
#include "llama-soft-prompt.h"
#include "scorer.h"
#include "sequences.h"

namespace fedbpt {

namespace {

// KV for a group, if it is of more than one text and candidate
constexpr size_t kCells = 16384;
constexpr uint64_t kGroupBytes = 512u << 20;

size_t cells_max(const llama_model * model) {
    const auto heads = static_cast<uint64_t>(std::max(llama_model_n_head(model), 1));
    const auto kv_heads = static_cast<uint64_t>(std::max(llama_model_n_head_kv(model), 1));
    const auto n_embd = static_cast<uint64_t>(llama_model_n_embd(model));
    const uint64_t bytes = 4 * n_embd * kv_heads / heads * static_cast<uint64_t>(llama_model_n_layer(model));
    return static_cast<size_t>(std::min<uint64_t>(kCells, kGroupBytes / std::max<uint64_t>(bytes, 1)));
}

// Seed of a text: mixed, so that seeds that follow each other share no text's; never llama.cpp's for a random one.
uint32_t seed_of(uint32_t seed, int64_t text) {
    uint64_t mixed = (uint64_t(seed) << 32 | static_cast<uint32_t>(text)) + 0x9E3779B97F4A7C15ULL;  // splitmix64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9ULL;
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EBULL;
    return static_cast<uint32_t>((mixed ^ (mixed >> 31)) % LLAMA_DEFAULT_SEED);
}

// Where the first of `stops` begins in `text`; npos: none is in it. Only its last `n_new` bytes are new.
size_t find_stop(const std::string & text, size_t n_new, const std::vector<std::string> & stops) {
    size_t found = std::string::npos;
    for (const std::string & stop : stops) {
        const size_t n_old = text.size() - n_new;
        found = std::min(found, text.find(stop, n_old - std::min(n_old, stop.size() - 1)));
    }
    return found;
}

}  // namespace

std::vector<Answer> Scorer::generate(Plan & plan, const int64_t * which, size_t n_which, const float * embeds,
                                     size_t n_candidates, size_t n_prompt, const Continuing & how,
                                     const std::function<bool()> & stop) {
    const Request request{ plan, which, n_which, embeds, n_candidates, n_prompt, nullptr };
    validate(request);
    check_sampling(how.sampling);
    if (plan.placement() == Placement::front || !plan.all_labels() || plan.n_continuations() > 0) {
        throw InputError(
            "this plan cannot be continued: compile it with label_ids=None and placement 'cue', 'layer' or 'layers'");
    }
    if (request.n_tail() + Session::kPad > Session::kBatch) {
        throw InputError(std::to_string(n_prompt) + " rows are too many to continue texts: use at most " +
                         std::to_string(Session::kBatch - Session::kPad));
    }
    if (how.max_tokens == 0) {
        throw InputError("max_tokens must be at least 1, got 0");
    }
    if (std::any_of(how.stops.begin(), how.stops.end(), [](const std::string & s) { return s.empty(); })) {
        throw InputError("a stop string is empty: leave it out");
    }
    for (size_t i = 0; i < n_which; ++i) {
        const size_t n = plan.prefix().size() + request.length(i) + how.max_tokens - 1;
        if (n > static_cast<size_t>(model_->n_ctx_train())) {
            throw InputError("text " + std::to_string(which[i]) + " with max_tokens = " +
                             std::to_string(how.max_tokens) + " is too long for the model's context of " +
                             std::to_string(model_->n_ctx_train()) + " tokens: shorten it, or generate fewer tokens");
        }
    }

    std::lock_guard<std::mutex> lock(mutex_);
    interrupted_ = false;
    const Session::Watch watch(session_, interrupted_, stop);

    std::vector<Answer> answers(request.n_outputs());
    try {
        const size_t n_tail = request.n_tail();
        const size_t live_max = std::clamp<size_t>((Session::kBatch - Session::kPad) / n_tail, 1, kGenerated);
        const size_t a_candidate = n_tail + how.max_tokens;
        const size_t most = cells_max(model_->get());
        const auto is_long = [&](size_t i) {  // LongRoPE's factors are those of the longest answer
            return model_->is_long(plan.prefix().size() + request.length(i) + how.max_tokens - 1);
        };
        for (size_t first = 0, last = 0; first < n_which; first = last) {
            const size_t head = request.head_of(first);
            const size_t fit = most > head + a_candidate ? (most - head) / a_candidate : 1;
            const size_t together = std::min({ n_candidates, live_max, fit });
            Pack pack{ first, first + 1, request.length(first), 0 };
            size_t n_cells = head + together * a_candidate;
            for (; pack.last < n_which && (pack.n_texts() + 1) * together <= live_max; ++pack.last) {
                n_cells += request.head_of(pack.last) + together * a_candidate;
                if (n_cells > most || is_long(pack.last) != is_long(first)) {
                    break;
                }
                pack.n_tokens += request.length(pack.last);
            }
            last = pack.last;
            is_long_ = is_long(first);
            for (size_t c = 0; c < n_candidates; c += together) {
                generate_group(request, pack, { c, std::min(c + together, n_candidates) }, how, answers);
            }
        }
    } catch (...) {
        if (session_.is_open()) {
            session_.clear();
        }
        throw;
    }
    return answers;
}

void Scorer::generate_group(const Request & request, const Pack & pack, const Group & group, const Continuing & how,
                            std::vector<Answer> & answers) {
    const Plan & plan = request.plan;
    const size_t n_tail = request.n_tail();
    const size_t slots = group.size();
    const size_t shared = pack.n_tokens + pack.n_texts() * plan.prefix().size();
    const size_t own = pack.n_texts() * slots * (n_tail + how.max_tokens);
    const auto n_ctx = static_cast<uint32_t>(padded(shared + own + 2 * Session::kPad, 256));
    const auto n_seq_max = static_cast<uint32_t>(padded(kFirstSeq + 1 + kGenerated, Session::kPad));
    if (!session_.is_open() || n_ctx > session_.n_cells() || n_seq_max != n_seq_max_) {
        session_.open({ n_ctx, n_seq_max, n_seq_max }, {},
                      "free memory, generate fewer tokens, or continue shorter texts");
        n_seq_max_ = n_seq_max;
    }
    llama_context * context = session_.context();
    llama_memory_clear(session_.memory(), /*data =*/false);
    llama_soft_prompt_clear(context);
    llama_soft_prompt_set_text_length(context, model_->rope_length(is_long_));
    llama_soft_prompt_set_labels(context, nullptr, 0, nullptr);
    llama_soft_prompt_set_taps(context, nullptr, 0);
    request.plan.keep_for_tail(n_tail);
    restore_texts(request, pack, slots);

    std::vector<Live> live;
    batch_.clear();
    for (size_t i = pack.first; i < pack.last; ++i) {
        const auto pos0 = static_cast<llama_pos>(request.head_of(i));
        const llama_token * ids = request.text(i) + request.length(i) - n_tail;
        Sampling sampling = how.sampling;
        sampling.seed = seed_of(sampling.seed, request.which[i]);
        for (size_t c = group.first; c < group.last; ++c) {
            const llama_seq_id seq =
                kFirstSeq + static_cast<llama_seq_id>((i - pack.first) * slots + (c - group.first));
            seqs_.assign(1, seq);
            set_prompt(request, c, pos0);
            for (size_t j = 0; j < n_tail; ++j) {
                batch_.add(ids[j], pos0 + static_cast<llama_pos>(j), seq, j + 1 == n_tail ? 0 : Batch::kNone);
            }
            live.push_back({ static_cast<size_t>(request.output_of(c, i)), seq, pos0 + static_cast<llama_pos>(n_tail),
                             sampling.temperature > 0.0f ? make_sampler(sampling) : nullptr,
                             static_cast<int32_t>(batch_.size()) - 1 });
        }
    }
    const int32_t n_layers = llama_model_n_layer(model_->get());
    while (!live.empty()) {
        const size_t n_tokens = batch_.size();
        Session::pad(batch_, /*outputs =*/true);
        if (!session_.decode(batch_, 0, batch_.size())) {
            throw std::runtime_error("the context has too few KV cells: please report this");
        }
        request.plan.count_tokens(n_tokens, n_layers);
        if (!llama_soft_prompt_shifted(context)) {
            throw UnsupportedModelError(kNoShifts);
        }
        std::vector<Live> going;
        batch_.clear();
        for (Live & each : live) {
            const llama_token token = choose(each);
            Answer & answer = answers[each.output];
            bool done = model_->is_end(token);
            if (!done) {
                const std::string piece = model_->piece(token);
                answer.ids.push_back(token);
                answer.text += piece;
                const size_t stop = find_stop(answer.text, piece.size(), how.stops);
                done = stop != std::string::npos || answer.ids.size() == how.max_tokens;
                answer.text.resize(std::min(answer.text.size(), stop));
            }
            if (done) {
                llama_memory_seq_rm(session_.memory(), each.seq, -1, -1);
                continue;
            }
            each.at = static_cast<int32_t>(batch_.size());
            batch_.add(token, each.pos++, each.seq, 0);
            going.push_back(std::move(each));
        }
        session_.remove_padding();
        live = std::move(going);
    }
    llama_soft_prompt_clear(context);
}

// The next token of a text: the likeliest, or one drawn by its sampler.
llama_token Scorer::choose(Live & live) {
    const float * logits = llama_get_logits_ith(session_.context(), live.at);
    const float * likeliest = std::max_element(logits, logits + model_->n_vocab());
    if (!std::isfinite(*likeliest)) {
        throw InputError("the model's logits are not finite under one of the candidates: use smaller numbers");
    }
    if (live.sampler == nullptr) {
        return static_cast<llama_token>(likeliest - logits);
    }
    return llama_sampler_sample(live.sampler.get(), session_.context(), live.at);
}

}  // namespace fedbpt
