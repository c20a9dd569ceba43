"""kvmexit for Cython: `from kvmexit cimport handler, kvmexit_exit, KVMEXIT_DONE`. Compile with -I kvmexit.get_include().

    cdef int beep(kvmexit_exit *exit, void *opaque) noexcept nogil:
        ...
        return KVMEXIT_DONE

    vm.on_pio(0x61, 1, handler(beep, &self.state, self))
"""

from cpython.pycapsule cimport PyCapsule_New, PyCapsule_SetContext
from libc.stdint cimport int32_t, uint32_t, uint64_t


cdef extern from "kvmexit/kvmexit.h" nogil:
    struct kvm_run:  # of <linux/kvm.h>
        pass
    struct kvmexit_exit:
        uint32_t version
        uint32_t reason
        int32_t error
        uint32_t vcpu
        uint64_t address
        uint64_t base
        uint64_t size
        uint32_t count
        uint32_t is_write
        uint32_t owes
        void *data
        uint64_t flags
        kvm_run *run
    ctypedef int (*kvmexit_handler)(kvmexit_exit *exit, void *opaque) noexcept nogil
    const uint32_t KVMEXIT_API_VERSION
    const char *KVMEXIT_HANDLER
    enum:
        KVMEXIT_DONE
        KVMEXIT_PASS
        KVMEXIT_STOP


cdef extern from "kvmexit/embed.h" nogil:
    const uint32_t KVMEXIT_EMBED_VERSION
    const char *KVMEXIT_EMBED
    const uint64_t KVMEXIT_FOREVER
    enum:
        KVMEXIT_RUN_EXIT
        KVMEXIT_RUN_PYTHON
        KVMEXIT_RUN_KICKED
        KVMEXIT_RUN_TIMED_OUT
        KVMEXIT_RUN_LOOPING
        KVMEXIT_RUN_BROKEN
    struct kvmexit_vcpu:
        pass
    struct kvmexit_api:
        uint32_t version
        uint32_t size
        kvmexit_vcpu *(*vcpu)(void *object) except NULL with gil
        int (*run)(kvmexit_vcpu *vcpu, uint64_t timeout_ns, const kvmexit_exit **exit) noexcept
        int (*exit)(kvmexit_vcpu *vcpu, const kvmexit_exit **exit) noexcept
        int (*answer)(kvmexit_vcpu *vcpu) noexcept
        int (*kick)(kvmexit_vcpu *vcpu) noexcept
        int (*convert)(kvmexit_vcpu *vcpu, uint64_t gpa, uint64_t size, int to_private, uint64_t *done) noexcept


cdef extern from "kvmexit/embed.h":
    const kvmexit_api *kvmexit_import() except NULL


cdef inline object handler(kvmexit_handler function, void *opaque=NULL, object owner=None):
    """-> a native handler, as every `vm.on_*()` takes it. opaque: what the function is given. owner: an object that is kept
    alive for as long as the handler, whose memory `opaque` is."""
    from kvmexit.native import Function
    capsule = PyCapsule_New(<void *>function, KVMEXIT_HANDLER, NULL)
    PyCapsule_SetContext(capsule, opaque)
    return Function(capsule, owner=owner)
