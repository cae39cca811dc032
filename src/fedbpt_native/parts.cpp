#include "parts.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <optional>

#include "errors.h"
#include "log.h"

namespace fedbpt {

namespace {

constexpr const char * kNumber = "split.no";
constexpr const char * kCount = "split.count";

std::string suffix(int number, int count) {
    char text[48];
    std::snprintf(text, sizeof(text), "-%05d-of-%05d.gguf", number + 1, count);
    return text;
}

bool ends_with(const std::string & text, const std::string & end) {
    return text.size() > end.size() && text.compare(text.size() - end.size(), std::string::npos, end) == 0;
}

std::string name_of(const std::string & path) {
    return std::filesystem::path(path).filename().string();
}

// The value of a 16-bit key, if any. Throws on another type, on which llama.cpp would abort.
std::optional<int> read_number(const gguf_context * gguf, const char * key, const std::string & path) {
    const int64_t id = gguf_find_key(gguf, key);
    if (id < 0) {
        return std::nullopt;
    }
    if (gguf_get_kv_type(gguf, id) != GGUF_TYPE_UINT16) {
        throw ModelFileError(path + " is damaged (" + key + " is not a 16-bit number): fetch it again");
    }
    return gguf_get_val_u16(gguf, id);
}

void check_present(const std::vector<std::string> & parts) {
    std::vector<std::string> missing;
    for (const std::string & part : parts) {
        std::error_code error;
        if (!std::filesystem::is_regular_file(part, error)) {
            missing.push_back(part);
        }
    }
    if (missing.empty()) {
        return;
    }
    const std::string others =
        missing.size() > 1 ? " and " + std::to_string(missing.size() - 1) + " more of its parts" : "";
    throw ModelFileError(missing.front() + others + " of a model in " + std::to_string(parts.size()) +
                         " files cannot be found: put all parts into one folder under their original names");
}

void check_part(const gguf_context * gguf, const std::string & path, int number, int count) {
    if (read_number(gguf, kNumber, path) != number || read_number(gguf, kCount, path) != count) {
        throw ModelFileError(path + " is not part " + std::to_string(number + 1) + " of " + std::to_string(count) +
                             " as its name says: fetch it again");
    }
    size_t size = gguf_get_data_offset(gguf);
    for (int64_t i = 0; i < gguf_get_n_tensors(gguf); ++i) {
        size = std::max(size,
                        gguf_get_data_offset(gguf) + gguf_get_tensor_offset(gguf, i) + gguf_get_tensor_size(gguf, i));
    }
    std::error_code error;
    const auto found = std::filesystem::file_size(path, error);
    if (error || found < size) {
        throw ModelFileError(path + " is truncated: fetch it again");
    }
}

// The remedy for a file that ggml's GGUF reader rejected, by the first error line in its log.
const char * read_advice(const std::string & error) {
    const auto has = [&](const char * part) { return error.find(part) != std::string::npos; };
    if (has("failed to open")) {
        return "make it readable for this user";
    }
    if (has("endianness")) {
        return "use a little-endian file, as this one is for big-endian machines";
    }
    if (has("only supports up to")) {
        return "use a newer fedbpt, or fetch it again";
    }
    if (has("GGUFv1")) {
        return "convert the model again, or use a newer file";
    }
    return "fetch it again, or convert the model to GGUF";
}

}  // namespace

GgufPtr open_gguf(const std::string & path) {
    install_log();
    take_error();
    GgufPtr gguf(gguf_init_from_file(path.c_str(), { /*no_alloc =*/true, /*ctx =*/nullptr }));
    if (!gguf) {
        const std::string error = take_error();
        throw ModelFileError(path + " is not a readable GGUF file (" + error + "): " + read_advice(error));
    }
    return gguf;
}

std::vector<std::string> model_parts(const std::string & path) {
    const GgufPtr given = open_gguf(path);
    const int count = read_number(given.get(), kCount, path).value_or(1);
    const int number = read_number(given.get(), kNumber, path).value_or(0);
    if (count <= 1) {
        return { path };
    }
    if (!ends_with(name_of(path), suffix(number, count))) {
        throw ModelFileError(path + " is part " + std::to_string(number + 1) + " of a model in " +
                             std::to_string(count) + " files: rename it to NAME" + suffix(number, count) +
                             ", in the folder of the other parts");
    }

    const std::string prefix = path.substr(0, path.size() - suffix(number, count).size());
    std::vector<std::string> parts;
    for (int i = 0; i < count; ++i) {
        parts.push_back(prefix + suffix(i, count));
    }
    check_present(parts);
    for (int i = 0; i < count; ++i) {
        const GgufPtr part = open_gguf(parts[static_cast<size_t>(i)]);
        check_part(part.get(), parts[static_cast<size_t>(i)], i, count);
    }
    return parts;
}

}  // namespace fedbpt
