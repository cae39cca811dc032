// Prints the lines of one decode's graph: see src/fedbpt_native/trace.h. Built against unpatched upstream by record_graphs.py.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>

#include "trace.h"

int main(int argc, char ** argv) {
    if (argc < 4 || (std::strcmp(argv[2], "flash") != 0 && std::strcmp(argv[2], "plain") != 0)) {
        std::fprintf(stderr, "usage: record MODEL.gguf flash|plain TOKEN...\n");
        return 2;
    }
    try {
        std::vector<llama_token> tokens;
        for (int i = 3; i < argc; ++i) {
            tokens.push_back(std::atoi(argv[i]));
        }
        fedbpt::GraphTrace trace(argv[1], std::strcmp(argv[2], "flash") == 0);
        for (const std::string & line : trace.decode(tokens, /*seq =*/ 0, /*pos0 =*/ 0)) {
            std::puts(line.c_str());
        }
    } catch (const std::exception & error) {
        std::fprintf(stderr, "record: %s\n", error.what());
        return 1;
    }
    return 0;
}
