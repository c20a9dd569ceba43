/*
 * A C program that embeds kvmexit. Python makes the VM, once; then threads of C's own run its vCPU, answer its exits,
 * convert memory and kick it, and none of them knows of Python.
 *
 *     cc -O2 -Wall -I "$(python3 -c 'import kvmexit; print(kvmexit.get_include())')" $(python3-config --cflags --embed) \
 *        embed/embed.c -o embed/embed $(python3-config --ldflags --embed) -lpthread
 *     ./embed/embed
 *
 * The guest writes 600 bytes to port 0x10, reads each back, then loops for ever; on KVM_DEVICE (/dev/kvm), or scripted.
 * kvmexit has to be importable: PYTHONPATH.
 */
#include <Python.h>

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include <kvmexit/embed.h>

static const char make_vm[] =
    "import os\n"
    "import kvmexit\n"
    "from kvmexit import testing\n"
    /* mov cx, 600; again: mov al, cl; out 0x10, al; in al, 0x10; loop again; jmp $ */
    "CODE = bytes.fromhex('b9 58 02 88 c8 e6 10 e4 10 e2 f8 eb fe')\n"
    "try:\n"
    "    vm = kvmexit.VM(device=os.environ.get('KVM_DEVICE', '/dev/kvm'))\n"
    "    vm.memory.add(0, 0x10000)[0x1000:0x1000 + len(CODE)] = CODE\n"
    "    vcpu = vm.create_vcpu(0)\n"
    "    kvmexit.x86.real_mode(vcpu, 0x1000)\n"
    "except kvmexit.Error as error:\n"
    "    print('scripted:', error, flush=True)\n"
    "    vm = testing.ScriptedVM()\n"
    "    vm.memory.add(0, 0x10000, guest_memfd=True, discard=False)\n"
    "    pairs = [(testing.pio_out(0x10, bytes([i & 0xff])), testing.pio_in(0x10)) for i in range(600, 0, -1)]\n"
    "    vcpu = vm.create_vcpu(0, [*sum(pairs, ()), testing.ScriptStep(spin=True)])\n";

struct machine {
    const struct kvmexit_api *api;
    struct kvmexit_vcpu *vcpu;
    unsigned char last;
    unsigned long accesses; /* atomic: the main thread waits for it */
    int ended;              /* what the last run() said */
};

static void echo(struct machine *m, const struct kvmexit_exit *exit)
{
    unsigned char *data = exit->data;
    if (exit->is_write)
        m->last = data[exit->size * exit->count - 1];
    else
        memset(data, ~m->last & 0xff, exit->size * exit->count);
    __atomic_fetch_add(&m->accesses, exit->count, __ATOMIC_SEQ_CST);
}

static void *run(void *opaque)
{
    struct machine *m = opaque;
    const struct kvmexit_exit *exit;
    for (;;) {
        m->ended = m->api->run(m->vcpu, KVMEXIT_FOREVER, &exit);
        if (m->ended != KVMEXIT_RUN_EXIT || exit->reason != 2 /* KVM_EXIT_IO */ || exit->address != 0x10)
            return NULL;
        echo(m, exit);
        m->api->answer(m->vcpu); /* a read has its answer; a write is content with none */
    }
}

int main(void)
{
    struct machine m = {0};
    PyObject *names, *vcpu = NULL, *done;
    PyThreadState *python;
    pthread_t thread;
    uint64_t converted;
    int error;

    Py_Initialize();
    names = PyDict_New();
    PyDict_SetItemString(names, "__builtins__", PyEval_GetBuiltins());
    done = PyRun_String(make_vm, Py_file_input, names, names);
    if (done && (m.api = kvmexit_import()) != NULL && (vcpu = PyDict_GetItemString(names, "vcpu")) != NULL)
        m.vcpu = m.api->vcpu(vcpu); /* good for as long as `names` holds it */
    if (!m.vcpu) {
        PyErr_Print();
        return 1;
    }

    python = PyEval_SaveThread(); /* from here on without Python */
    if (pthread_create(&thread, NULL, run, &m) != 0)
        return 1;
    while (__atomic_load_n(&m.accesses, __ATOMIC_SEQ_CST) < 1200)
        usleep(1000);
    error = m.api->convert(m.vcpu, 0x8000, 0x2000, 1, &converted); /* while the guest loops */
    m.api->kick(m.vcpu);
    pthread_join(thread, NULL);
    PyEval_RestoreThread(python);

    printf("accesses %lu, last %#x, run %s, convert %s (%#llx bytes)\n", m.accesses, m.last,
           m.ended == KVMEXIT_RUN_KICKED ? "kicked" : m.ended < 0 ? strerror(-m.ended) : "otherwise",
           error == 0 ? "done" : error == -ENXIO || error == -EOPNOTSUPP ? "not with this VM" : strerror(-error),
           (unsigned long long)converted);
    done = PyRun_String("vm.close()", Py_file_input, names, names);
    Py_XDECREF(done);
    Py_DECREF(names);
    return Py_FinalizeEx() == 0 && m.ended == KVMEXIT_RUN_KICKED ? 0 : 1;
}
