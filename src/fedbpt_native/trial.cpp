#include "trial.h"

#include <sys/resource.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>
#include <vector>

#include "errors.h"
#include "generator.h"
#include "model.h"
#include "scorer.h"

namespace fedbpt {

namespace {

constexpr size_t kRun = 4096;     // length in bytes of a text that repeats a few characters
constexpr size_t kPieces = 1000;  // tokens of the vocabulary whose pieces are joined to a text
constexpr uint32_t kStep = 251;   // step between the code points that are tried

bool never() {
    return false;
}

// n tokens spread evenly over the vocabulary, including the first and, if n > 1, the last.
std::vector<llama_token> spread(const Model & model, size_t n) {
    std::vector<llama_token> ids;
    for (size_t i = 0; i < n; ++i) {
        ids.push_back(static_cast<llama_token>(static_cast<int64_t>(i) * (model.n_vocab() - 1) /
                                               static_cast<int64_t>(std::max<size_t>(n - 1, 1))));
    }
    return ids;
}

std::string utf8(uint32_t c) {
    const auto byte = [](uint32_t value) { return static_cast<char>(value); };
    if (c < 0x80) {
        return { byte(c) };
    }
    if (c < 0x800) {
        return { byte(0xc0 | c >> 6), byte(0x80 | (c & 0x3f)) };
    }
    if (c < 0x10000) {
        return { byte(0xe0 | c >> 12), byte(0x80 | (c >> 6 & 0x3f)), byte(0x80 | (c & 0x3f)) };
    }
    return { byte(0xf0 | c >> 18), byte(0x80 | (c >> 12 & 0x3f)), byte(0x80 | (c >> 6 & 0x3f)),
             byte(0x80 | (c & 0x3f)) };
}

void try_texts(const Model & model) {
    std::vector<std::string> texts(3);
    for (int byte = 0; byte < 256; ++byte) {
        texts.push_back(std::string(1, static_cast<char>(byte)));
        texts[0] += static_cast<char>(byte);
    }
    for (uint32_t c = 0x80; c < 0x110000; c += c >= 0xd800 - kStep && c < 0xe000 ? 0xe000 - c : kStep) {
        texts[1] += utf8(c);
    }
    for (const llama_token id : spread(model, kPieces)) {
        texts[2] += model.piece(id);
    }
    for (const char * run : { "a", "A", "0", " ", "\n", ".", "\u4e2d", " a", "a0" }) {
        texts.emplace_back();
        while (texts.back().size() < kRun) {
            texts.back() += run;
        }
    }
    for (const std::string & text : texts) {
        const bool pieces = &text == &texts[2];
        for (const llama_token id : model.tokenize(text, /*add_bos =*/0, /*parse_special =*/pieces)) {
            model.check_token(id, "its tokenizer's token id");
        }
    }
    for (llama_token id = 0; id < model.n_vocab(); ++id) {
        model.piece(id);
        model.is_end(id);
    }
}

void check_finite(const std::vector<float> & numbers) {
    if (!std::all_of(numbers.begin(), numbers.end(), [](float number) { return std::isfinite(number); })) {
        throw InputError("its logits are not finite");
    }
}

std::vector<float> embeddings(const Model & model, const std::vector<llama_token> & ids) {
    std::vector<float> rows(ids.size() * static_cast<size_t>(model.n_embd()));
    model.token_embeddings(ids.data(), ids.size(), rows.data());
    return rows;
}

// Scores two texts under two candidates or, with continuations, under one, with two continuations per text and the
// whole vocabulary's logits.
void try_scores(const std::shared_ptr<const Model> & model, Scorer & scorer, Placement placement, bool continuations) {
    constexpr size_t kRows = 2;
    const std::vector<llama_token> some = spread(*model, 7);
    const Ragged texts = { { some[1], some[2], some[3], some[4], some[5] }, { 0, 3, 5 } };
    const std::vector<llama_token> labels = { some[0], some[6] };
    const Ragged follow = continuations
                              ? Ragged{ { some[2], some[3], some[1], some[2], some[3], some[4] }, { 0, 2, 3, 5, 6 } }
                              : Ragged{};

    Plan plan(model, texts, placement, /*prefix =*/{ some[6] }, /*all_labels =*/continuations, labels, follow,
              /*layers =*/{ 0 }, /*kv_budget_bytes =*/0);
    const std::vector<float> rows = embeddings(*model, { some[0], some[6], some[1], some[4] });
    const std::vector<int64_t> which = { 0, 1 };
    const size_t n = continuations ? 1 : 2;
    std::vector<float> logits(n * which.size() * plan.n_columns());
    scorer.score(plan, which.data(), which.size(), rows.data(), n, kRows, logits.data(), /*states =*/nullptr, never);
    check_finite(logits);
}

void try_generation(const std::shared_ptr<const Model> & model, const TrialSettings & settings, ggml_type kv_type) {
    Generator generator(model, settings.n_threads, kv_type);
    Input input{ spread(*model, 3), {}, 1 };
    input.rows = embeddings(*model, { input.ids[2] });
    const auto stream = generator.open(std::move(input), Sampling{ 0.8f, 0.9f, 40, 1 });
    for (int i = 0; i < 2; ++i) {
        generator.next(*stream, /*n_likeliest =*/1, never);
    }
}

void try_chat(const Model & model) {
    std::string text;
    try {
        text = model.chat_text({ { "system", "s" }, { "user", "u" }, { "assistant", "a" }, { "user", "u" } });
    } catch (const InputError &) {
        return;  // there is none, or llama.cpp does not know it: reported when a chat needs it
    }
    model.tokenize(text, /*add_bos =*/-1, /*parse_special =*/true);
}

void say(const std::string & line) {
    const std::string whole = one_line(line) + "\n";
    for (size_t done = 0; done < whole.size();) {
        const ssize_t n = write(STDOUT_FILENO, whole.data() + done, whole.size() - done);
        if (n <= 0) {
            _exit(1);  // nobody reads
        }
        done += static_cast<size_t>(n);
    }
}

void on_abort(const char * message_) {
    std::string message = message_;  // "folder/file.cpp:line: why"
    const size_t folder = message.rfind('/', message.find(':'));
    say("abort " + (folder == std::string::npos ? message : message.substr(folder + 1)));
}

uint64_t cpu_seconds_so_far() {
    rusage used{};
    getrusage(RUSAGE_SELF, &used);
    return static_cast<uint64_t>(used.ru_utime.tv_sec + used.ru_stime.tv_sec);
}

void limit(int resource, uint64_t most) {
    rlimit limits{};
    if (getrlimit(resource, &limits) == 0) {
        limits.rlim_cur = std::min<rlim_t>(most, limits.rlim_max);
        setrlimit(resource, &limits);
    }
}

void enter_limits(const ProcessLimits & limits) {
#ifdef __linux__
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    std::ofstream("/proc/self/oom_score_adj") << 1000;
    prctl(PR_SET_DUMPABLE, 0);
#ifndef __SANITIZE_ADDRESS__  // its shadow memory takes terabytes
    if (limits.memory_bytes > 0) {
        limit(RLIMIT_DATA, limits.memory_bytes);
    }
#endif
#endif
    limit(RLIMIT_CORE, 0);
    if (limits.cpu_seconds > 0) {
        limit(RLIMIT_CPU, cpu_seconds_so_far() + limits.cpu_seconds);
    }
    std::signal(SIGINT, SIG_IGN);  // Ctrl-C goes to the parent, which ends this process
}

}  // namespace

void try_model(const std::string & path, const TrialSettings & settings,
               const std::function<void(const char * stage)> & on_stage) {
    on_stage("while it is loaded");
    const auto model = Model::load(path, settings.n_gpu_layers, settings.gpu);

    const ggml_type kv_type = settings.kv_q8_0 ? GGML_TYPE_Q8_0 : GGML_TYPE_F16;
    auto scorer = std::make_unique<Scorer>(model, settings.n_threads, kv_type);

    try {
        on_stage("while its tokenizer reads and writes texts");
        try_texts(*model);
        try_chat(*model);

        on_stage("while texts are scored");
        try_scores(model, *scorer, Placement::front, /*continuations =*/false);
        try_scores(model, *scorer, Placement::cue, /*continuations =*/false);
        try_scores(model, *scorer, Placement::front, /*continuations =*/true);
        scorer.reset();

        on_stage("while text is generated");
        try_generation(model, settings, kv_type);
    } catch (const InputError & error) {  // the inputs are valid, so the model is at fault
        throw ModelFileError(path + " cannot be used (" + error.what() +
                             "): fetch it again, or use another file of the model");
    }
}

void try_alone(const std::string & path, const TrialSettings & settings, const ProcessLimits & limits) {
    enter_limits(limits);
    ggml_set_abort_callback(on_abort);

    const auto refuse = [](const char * type, const std::string & why) {
        say("refused " + std::string(type) + " " + why);
    };
    try {
        try_model(path, settings, [](const char * stage) { say("stage " + std::string(stage)); });
        say("passed");
    } catch (const InputError & error) {
        refuse("InputError", error.what());
    } catch (const UnsupportedModelError & error) {
        refuse("UnsupportedModelError", error.what());
    } catch (const ModelFileError & error) {
        refuse("ModelFileError", error.what());
    } catch (const std::bad_alloc &) {
        refuse("ModelFileError", path +
                                     " takes more memory than expected for its size, or than is free: end other "
                                     "programs, fetch it again, or use a smaller model or format");
    } catch (const std::exception & error) {
        refuse("ModelFileError",
               path + " cannot be used (" + error.what() + "): use another file of the model, or a newer fedbpt");
    } catch (...) {
        refuse("ModelFileError", path + " cannot be used: use another file of the model, or a newer fedbpt");
    }
}

}  // namespace fedbpt
