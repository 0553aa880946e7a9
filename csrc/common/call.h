// From a call in Python to a kernel, quickly: tensors are read through DLPack's C exchange API, a table of functions
// that torch.Tensor carries for this (https://dmlc.github.io/dlpack/latest/python_spec.html), so that no header of
// torch is needed and no Python object is made for a shape, a stride or an address. Included by register.cpp alone.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>
#include <stdexcept>

namespace llmkern::call {

// DLTensor and DLPackExchangeAPI of DLPack 1.3, with their fields; a test compares them with torch's copy of the
// header.
struct Description {
  void* data;
  int32_t device_type, device_index;
  int32_t dimensions;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* older;
  void *allocate, *export_owned, *import_owned;
  int (*describe)(void* tensor, Description* out);  // borrows; not 0: failed, with a Python exception
  void* current_stream;
};

// What `connect` was given; it lives as long as the process.
struct Torch {
  const ExchangeApi* api = nullptr;
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
  PyObject *is_grad_enabled = nullptr, *forward_ad = nullptr;
  // Functions without arguments that give None, 0 or False in ordinary eager mode.
  PyObject* modes = nullptr;
  PyObject *level = nullptr, *is_neg = nullptr, *requires_grad = nullptr, *data_ptr = nullptr;  // names, interned
};
inline Torch& torch() {
  static Torch t;
  return t;
}

inline PyObject* connect(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 6 || !PyType_Check(args[0]) || !PyType_Check(args[1]) || !PyTuple_Check(args[4])) {
    PyErr_SetString(PyExc_TypeError,
                    "connect: expected Tensor, Parameter, is_grad_enabled, forward_ad, modes, capsule");
    return nullptr;
  }
  for (Py_ssize_t i = 0; i < count; i++) Py_INCREF(args[i]);
  Torch& t = torch();
  t.tensor = reinterpret_cast<PyTypeObject*>(args[0]), t.parameter = reinterpret_cast<PyTypeObject*>(args[1]);
  t.is_grad_enabled = args[2], t.forward_ad = args[3], t.modes = args[4];
  t.level = PyUnicode_InternFromString("_current_level"), t.is_neg = PyUnicode_InternFromString("is_neg");
  t.requires_grad = PyUnicode_InternFromString("requires_grad"), t.data_ptr = PyUnicode_InternFromString("data_ptr");
  if (args[5] != Py_None) {
    auto* api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(args[5], "dlpack_exchange_api"));
    if (!api) return nullptr;
    while (api && api->major != 1) api = api->older;
    if (api && api->describe) t.api = api;
  }
  return PyBool_FromLong(t.api != nullptr);
}

// The lowest address that this process has memory at: that of the program itself, on Linux.
inline uintptr_t lowest_address() {
  uintptr_t lowest = 4096;
  if (FILE* maps = std::fopen("/proc/self/maps", "r")) {
    unsigned long long first;
    if (std::fscanf(maps, "%llx", &first) == 1) lowest = static_cast<uintptr_t>(first);
    std::fclose(maps);
  }
  return lowest;
}

// Whether it has elements, but its memory was given back (a storage resized to nothing, as sharding does): its address
// is then the offset into the storage alone. Memory of a GPU may lie below that of this process; only an offset of up
// to a megabyte is told from it.
inline bool released(const Description& d) {
  static const uintptr_t lowest = lowest_address();
  constexpr int kCpu = 1;  // DLPack's DLDeviceType
  constexpr uintptr_t kLowestElsewhere = 1 << 20;
  if (reinterpret_cast<uintptr_t>(d.data) + d.byte_offset >= (d.device_type == kCpu ? lowest : kLowestElsewhere))
    return false;
  for (int i = 0; i < d.dimensions; i++)
    if (d.shape[i] == 0) return false;
  return true;
}

inline bool is_tensor(PyObject* x) { return Py_TYPE(x) == torch().tensor || Py_TYPE(x) == torch().parameter; }

// Whether what the function or attribute gave, a new reference, is true; -1 with a Python exception where it is null.
inline int truth(PyObject* result) {
  if (!result) return -1;
  int is = result == Py_True ? 1 : result == Py_False || result == Py_None ? 0 : PyObject_IsTrue(result);
  Py_DECREF(result);
  return is;
}

// Whether torch is in ordinary eager mode, where a call past its dispatcher loses nothing; -1 with an exception.
inline int ordinary() {
  const Torch& t = torch();
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(t.modes); i++) {
    PyObject* result = PyObject_CallNoArgs(PyTuple_GET_ITEM(t.modes, i));
    if (!result) return -1;
    bool none = result == Py_None || result == Py_False || (PyLong_Check(result) && PyLong_AsLong(result) == 0);
    Py_DECREF(result);
    if (!none) return 0;
  }
  PyObject* level = PyObject_GetAttr(t.forward_ad, t.level);
  if (!level) return -1;
  long at = PyLong_AsLong(level);
  Py_DECREF(level);
  return at < 0;
}

// All that checks and plans may look at, as bytes: equal for two calls where one plan serves both.
class Key {
 public:
  template <class T>
  bool put(T x) {
    if (used_ + sizeof x > sizeof bytes_) return false;
    std::memcpy(bytes_ + used_, &x, sizeof x);
    used_ += sizeof x;
    return true;
  }
  // False where this argument is nothing that a key can hold: a subclass of a tensor, another object, a huge one.
  bool argument(PyObject* x, bool grad_enabled) {
    if (is_tensor(x)) return tensor(x, grad_enabled);
    if (x == Py_None) return put('n');
    if (x == Py_True || x == Py_False) return put(x == Py_True ? 't' : 'f');
    if (PyFloat_CheckExact(x)) return put('d') && put(PyFloat_AS_DOUBLE(x));
    if (PyLong_CheckExact(x)) {
      int overflow = 0;
      long long value = PyLong_AsLongLongAndOverflow(x, &overflow);
      return !overflow && put('i') && put(value);
    }
    if (PyUnicode_CheckExact(x)) {
      Py_ssize_t size = 0;
      const char* text = PyUnicode_AsUTF8AndSize(x, &size);
      if (!text || used_ + static_cast<size_t>(size) + 9 > sizeof bytes_) return false;
      put('s'), put(static_cast<int64_t>(size));
      std::memcpy(bytes_ + used_, text, static_cast<size_t>(size));
      used_ += static_cast<size_t>(size);
      return true;
    }
    return false;
  }
  // The first byte says whether autograd must record the call.
  PyObject* finish() {
    bytes_[0] = grad_;
    return PyBytes_FromStringAndSize(bytes_, static_cast<Py_ssize_t>(used_));
  }

 private:
  bool tensor(PyObject* x, bool grad_enabled) {
    const Torch& t = torch();
    Description d;
    if (!t.api || t.api->describe(x, &d) != 0 || released(d)) return false;
    // A view that negates when it is read keeps other numbers in memory.
    if (d.type_code == 2 && truth(PyObject_CallMethodNoArgs(x, t.is_neg)) != 0) return false;
    if (grad_enabled && !grad_) {
      int needs = truth(PyObject_GetAttr(x, t.requires_grad));
      if (needs < 0) return false;
      grad_ = static_cast<char>(needs);
    }
    uint32_t type = static_cast<uint32_t>(d.type_code) << 8 | d.type_bits;
    if (!put('T') || !put(type) || !put(d.device_type << 16 | d.device_index) || !put(d.dimensions)) return false;
    for (int i = 0; i < d.dimensions; i++)
      if (!size(d.shape[i]) || !size(d.strides[i])) return false;
    return true;
  }
  bool size(int64_t x) {  // 4 bytes where they do, which makes the key quicker to look up
    if (x >= 0 && x < INT32_MAX) return put(static_cast<int32_t>(x));
    return put(INT32_MAX) && put(x);
  }

  char bytes_[1024];
  size_t used_ = 1;
  char grad_ = 0;
};

inline PyObject* make_key(PyObject* const* args, Py_ssize_t count, bool grad_enabled) {
  Key key;
  for (Py_ssize_t i = 0; i < count; i++)
    if (!key.argument(args[i], grad_enabled)) {
      PyErr_Clear();
      Py_RETURN_NONE;
    }
  return key.finish();
}

inline PyObject* metadata_key(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return make_key(args, count, false);
}

inline PyObject* call_key(PyObject*, PyObject* const* args, Py_ssize_t count) {
  int is_ordinary = ordinary();
  if (is_ordinary < 0) return nullptr;
  if (!is_ordinary) Py_RETURN_NONE;
  int grad_enabled = truth(PyObject_CallNoArgs(torch().is_grad_enabled));
  return grad_enabled < 0 ? nullptr : make_key(args, count, grad_enabled);
}

// The address of a tensor's first element, null for None. False with a Python exception for what has none.
inline bool address(PyObject* x, void** out) {
  *out = nullptr;
  if (x == Py_None) return true;
  if (torch().api && is_tensor(x)) {
    Description d;
    if (torch().api->describe(x, &d) != 0) return false;
    if (released(d)) {
      PyErr_SetString(PyExc_ValueError, "expected tensors with memory, got one whose storage was released");
      return false;
    }
    *out = static_cast<char*>(d.data) + d.byte_offset;
    return true;
  }
  PyObject* number = PyObject_CallMethodNoArgs(x, torch().data_ptr);
  if (!number) return false;
  *out = PyLong_AsVoidPtr(number);
  Py_DECREF(number);
  return !PyErr_Occurred();
}

// The exception that is being handled, as a Python one. Gives null, for the caller to return.
inline PyObject* raise() {
  try {
    throw;
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::invalid_argument& e) {
    PyErr_SetString(PyExc_ValueError, e.what());
  } catch (const pybind11::cast_error&) {
    PyErr_SetString(PyExc_TypeError, "expected a plan of this kernel");
  } catch (const pybind11::reference_cast_error&) {  // for None
    PyErr_SetString(PyExc_TypeError, "expected a plan of this kernel");
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
  }
  return nullptr;
}

using Fast = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

// Adds a function to the module; `definition` must live as long as the process.
inline void define(pybind11::module_& m, PyMethodDef& definition, const char* name, Fast function, const char* doc) {
  definition = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, doc};
  PyObject* made = PyCFunction_NewEx(&definition, m.ptr(), nullptr);
  if (!made) throw pybind11::error_already_set();
  m.attr(name) = pybind11::reinterpret_steal<pybind11::object>(made);
}

// A kernel as a Python function: kernel(plan, threads, tensor or None, ...). kFill(params, addresses) puts the
// addresses of the kTensors tensors where they belong; it must not keep state.
template <class Params, int kTensors, void (*kFill)(Params&, void* const*), void (*kRun)(const Params&)>
PyObject* kernel(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != kTensors + 2) {
    PyErr_Format(PyExc_TypeError, "expected a plan, threads and %d tensors, got %zd arguments", kTensors, count);
    return nullptr;
  }
  void* addresses[kTensors];
  for (int i = 0; i < kTensors; i++)
    if (!address(args[i + 2], addresses + i)) return nullptr;
  try {
    Params params = pybind11::handle(args[0]).cast<const Params&>();
    params.threads = static_cast<int>(PyLong_AsLong(args[1]));
    if (PyErr_Occurred()) return nullptr;
    kFill(params, addresses);
    PyThreadState* state = PyEval_SaveThread();
    try {
      kRun(params);
    } catch (...) {
      PyEval_RestoreThread(state);
      throw;
    }
    PyEval_RestoreThread(state);
  } catch (...) {
    return raise();
  }
  Py_RETURN_NONE;
}

template <class Params, int kTensors, void (*kFill)(Params&, void* const*), void (*kRun)(const Params&)>
void define_kernel(pybind11::module_& m, const char* name) {
  static PyMethodDef definition;
  define(m, definition, name, kernel<Params, kTensors, kFill, kRun>, "A kernel: (plan, threads, tensor or None, ...).");
}

inline void bind(pybind11::module_& m) {
  static PyMethodDef definitions[3];
  define(m, definitions[0], "connect", connect,
         "Hands over torch's Tensor, Parameter, is_grad_enabled, forward_ad module, functions of its modes, and the "
         "capsule of DLPack's exchange API; returns whether this library can use it.");
  define(m, definitions[1], "metadata_key", metadata_key,
         "Bytes that are equal for arguments of equal metadata (a False byte first); None where there are none.");
  define(m, definitions[2], "call_key", call_key,
         "The same for a call in ordinary eager mode, whose first byte says whether autograd records it; else None.");
}

}  // namespace llmkern::call
