/*
 * A native handler from C: an extension module gives out a PyCapsule. Its name says the signature, its context is the
 * handler's second argument. echo.c is the device.
 *
 *     cc -shared -fPIC -O2 -I "$(python -c 'import sysconfig; print(sysconfig.get_paths()["include"])')" \
 *        -I "$(python -c 'import kvmexit; print(kvmexit.get_include())')" \
 *        -o "echomodule$(python -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')" handler_c/echomodule.c
 *     python handler_c/main.py
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "../echo.c"

static void destroy(PyObject *capsule)
{
    PyMem_RawFree(PyCapsule_GetContext(capsule));
}

static PyObject *create(PyObject *self, PyObject *unused)
{
    uint64_t *state = PyMem_RawCalloc(2, sizeof *state);
    PyObject *capsule;
    (void)self;
    (void)unused;
    if (!state)
        return PyErr_NoMemory();
    capsule = PyCapsule_New((void *)echo, KVMEXIT_HANDLER, NULL);
    if (!capsule || PyCapsule_SetContext(capsule, state) != 0 || PyCapsule_SetDestructor(capsule, destroy) != 0) {
        PyMem_RawFree(state);
        Py_XDECREF(capsule);
        return NULL;
    }
    return capsule;
}

static PyObject *state(PyObject *self, PyObject *capsule)
{
    uint64_t *words;
    (void)self;
    if (!PyCapsule_IsValid(capsule, KVMEXIT_HANDLER)) {
        PyErr_SetString(PyExc_TypeError, "an echo device is wanted");
        return NULL;
    }
    words = PyCapsule_GetContext(capsule);
    return Py_BuildValue("KK", (unsigned long long)words[0], (unsigned long long)words[1]);
}

static PyMethodDef methods[] = {
    {"create", create, METH_NOARGS, "An echo device: a native handler."},
    {"state", state, METH_O, "What an echo device holds: the byte written last, and how many accesses there were."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "echomodule", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_echomodule(void)
{
    return PyModule_Create(&module);
}
