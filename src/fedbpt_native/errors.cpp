#include "errors.h"

#include <cstdio>

namespace fedbpt {

namespace {

// Length in bytes of the UTF-8 character that begins there; 0 if it is invalid.
size_t character_length(const std::string & text, size_t at) {
    const auto lead = static_cast<unsigned char>(text[at]);
    const size_t length = lead < 0x80                   ? 1
                          : lead >= 0xc2 && lead < 0xe0 ? 2
                          : lead >= 0xe0 && lead < 0xf0 ? 3
                          : lead >= 0xf0 && lead < 0xf5 ? 4
                                                        : 0;
    if (length == 0 || at + length > text.size()) {
        return 0;
    }
    for (size_t i = 1; i < length; ++i) {
        if ((static_cast<unsigned char>(text[at + i]) & 0xc0) != 0x80) {
            return 0;
        }
    }
    const auto second = static_cast<unsigned char>(length > 1 ? text[at + 1] : 0);
    // an overlong encoding, a surrogate, or beyond U+10FFFF
    const bool wrong = (lead == 0xe0 && second < 0xa0) || (lead == 0xed && second > 0x9f) ||
                       (lead == 0xf0 && second < 0x90) || (lead == 0xf4 && second > 0x8f);
    return wrong ? 0 : length;
}

bool is_control(const std::string & text, size_t at, size_t length) {
    const auto lead = static_cast<unsigned char>(text[at]);
    // C0 and DEL; C1; the line and paragraph separators
    return (length == 1 && (lead < 0x20 || lead == 0x7f)) ||
           (length == 2 && lead == 0xc2 && static_cast<unsigned char>(text[at + 1]) < 0xa0) ||
           text.compare(at, length, "\xe2\x80\xa8") == 0 || text.compare(at, length, "\xe2\x80\xa9") == 0;
}

}  // namespace

std::string one_line(const std::string & text) {
    std::string line;
    for (size_t at = 0; at < text.size();) {
        const size_t length = character_length(text, at);
        if (length == 0) {
            char escaped[5];
            std::snprintf(escaped, sizeof(escaped), "\\x%02x", static_cast<unsigned char>(text[at]));
            line += escaped;
        } else if (is_control(text, at, length)) {
            line += ' ';
        } else {
            line.append(text, at, length);
        }
        at += length == 0 ? 1 : length;
    }
    return line;
}

}  // namespace fedbpt
