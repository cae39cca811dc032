#include <pybind11/pybind11.h>

#include <string>

#include "errors.h"

namespace py = pybind11;

namespace fedbpt {

namespace {

void raise(const char * name, const std::exception & error) {
    const py::object type = py::module_::import("fedbpt.errors").attr(name);
    // a path, or what a model file holds, need not be UTF-8
    const std::string line = one_line(error.what());
    const auto        text = py::reinterpret_steal<py::object>(PyUnicode_DecodeUTF8(line.data(), static_cast<py::ssize_t>(line.size()), "backslashreplace"));
    PyErr_SetObject(type.ptr(), text.ptr());
}

}  // namespace

void register_errors(py::module_ & /*module*/) {
    py::register_exception_translator([](std::exception_ptr pending) {
        try {
            if (pending) {
                std::rethrow_exception(pending);
            }
        } catch (const InputError & error) {
            raise("InputError", error);
        } catch (const ModelFileError & error) {
            raise("ModelFileError", error);
        } catch (const UnsupportedModelError & error) {
            raise("UnsupportedModelError", error);
        } catch (const ScoringInterrupted & error) {
            raise("ScoringInterrupted", error);
        }
    });
}

}  // namespace fedbpt
