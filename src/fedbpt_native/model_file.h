#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "handles.h"

namespace fedbpt {

// What a model file says of itself, read without its weights.
class ModelFile {
public:
    // path: of a split model the first part. Throws ModelFileError: no GGUF, cut short, or nothing that names an
    // architecture.
    explicit ModelFile(std::string path);

    const std::string & architecture() const { return architecture_; }

    // Whether it can be scored and generated with, as far as its header tells. llama.cpp finds the rest as it loads the
    // weights; on some of what is looked for here it would end the process instead, or never return. Throws
    // UnsupportedModelError: no causal decoder, or one that soft prompts do not work with. ModelFileError: settings, a
    // vocabulary or tensors that cannot be.
    void check() const;

private:
    std::optional<int64_t> find(const std::string & key) const;
    std::string key(const char * name) const { return architecture_ + "." + name; }
    std::string text(const std::string & key) const;
    // A number, or an array of them; empty where there are none.
    std::vector<double> numbers(const std::string & key) const;
    std::optional<double> number(const std::string & key) const;
    // Entries of an array; none where there is no array.
    std::optional<size_t> length(const std::string & key) const;

    void check_size() const;
    void check_kind() const;
    void check_settings() const;
    void check_heads() const;
    void check_experts() const;
    void check_range(const char * name, double least, double most) const;
    void check_vocabulary() const;
    void check_tensors() const;

    [[noreturn]] void throw_damaged(const std::string & what) const;
    [[noreturn]] void throw_unsupported(const std::string & why) const;

    std::string path_;
    GgufPtr gguf_;
    std::string architecture_;
};

// What to do about a file that llama.cpp did not load, by the first error line that it logged.
std::string load_advice(const std::string & error);

}  // namespace fedbpt
