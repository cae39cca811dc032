#include <pybind11/pybind11.h>

#include "errors.h"

namespace py = pybind11;

namespace fedbpt {

namespace {

void raise(const char * name, const std::exception & error) {
    const py::object type = py::module_::import("fedbpt.errors").attr(name);
    PyErr_SetString(type.ptr(),
                    one_line(error.what()).c_str());  // paths and text from a model file may be invalid UTF-8
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
