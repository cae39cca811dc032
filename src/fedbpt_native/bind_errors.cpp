#include <pybind11/pybind11.h>

#include <cstring>

#include "errors.h"

namespace py = pybind11;

namespace fedbpt {

namespace {

void raise(const char * name, const std::exception & error) {
    const py::object type = py::module_::import("fedbpt.errors").attr(name);
    // it may quote a model file, whose strings need not be UTF-8
    const py::object text = py::reinterpret_steal<py::object>(PyUnicode_DecodeUTF8(error.what(), static_cast<py::ssize_t>(std::strlen(error.what())), "replace"));
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
