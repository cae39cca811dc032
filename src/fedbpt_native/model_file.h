#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "handles.h"

namespace fedbpt {

// The header of a model file: its settings, vocabulary and list of tensors, read without its weights.
class ModelFile {
public:
    // path: the file, or the first part of a split model. Throws ModelFileError: not a GGUF file, truncated, or without
    // an architecture.
    explicit ModelFile(std::string path);

    const std::string & architecture() const { return architecture_; }

    // Checks the header for everything that scoring and generation need. llama.cpp checks the rest when it loads the
    // weights; for some of the errors found here it would end the process, or never return. Throws
    // UnsupportedModelError: no causal decoder, or one that soft prompts do not work with. ModelFileError: impossible
    // settings, vocabulary or tensors.
    void check() const;

private:
    std::optional<int64_t> find(const std::string & key) const;
    std::string key(const char * name) const { return architecture_ + "." + name; }
    std::string text(const std::string & key) const;
    // The value of a number, or of an array of numbers; empty for other types or a missing key.
    std::vector<double> numbers(const std::string & key) const;
    std::optional<double> number(const std::string & key) const;
    // Length of an array; nullopt if there is no array.
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

// The remedy for a file that llama.cpp did not load, by the first error line in its log.
std::string load_advice(const std::string & error);

}  // namespace fedbpt
