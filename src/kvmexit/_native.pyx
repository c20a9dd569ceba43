"""Handlers in native code: other people's functions, and those that every VMM needs.

Each is an object of Python's that owns what its C function works on. The functions run on vCPU threads without the GIL,
several at once; the state that they share is atomic.
"""

import fcntl
import os
import stat

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.pycapsule cimport (
    PyCapsule_CheckExact, PyCapsule_GetContext, PyCapsule_GetName, PyCapsule_GetPointer, PyCapsule_IsValid,
)
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memset
from posix.unistd cimport close

from kvmexit._chain cimport (
    KVMEXIT_DONE, KVMEXIT_HANDLER, KVMEXIT_PASS, KVMEXIT_STOP, kvmexit_exit, kvmexit_handler,
)
from kvmexit._routes cimport Native
from kvmexit._uapi cimport KVM_EXIT_HYPERCALL, KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd_write(int fd, uint64_t value)

cdef extern from * nogil:
    """
    #include <stdint.h>
    #define kvmexit_count(at) __atomic_fetch_add(at, 1, __ATOMIC_RELAXED)
    #define kvmexit_counted(at) __atomic_load_n(at, __ATOMIC_RELAXED)
    #define kvmexit_load(type, at) __atomic_load_n((type *)(at), __ATOMIC_RELAXED)
    #define kvmexit_store(type, at, value) __atomic_store_n((type *)(at), value, __ATOMIC_RELAXED)
    #define kvmexit_load8(at) kvmexit_load(uint8_t, at)
    #define kvmexit_load16(at) kvmexit_load(uint16_t, at)
    #define kvmexit_load32(at) kvmexit_load(uint32_t, at)
    #define kvmexit_load64(at) kvmexit_load(uint64_t, at)
    #define kvmexit_store8(at, value) kvmexit_store(uint8_t, at, value)
    #define kvmexit_store16(at, value) kvmexit_store(uint16_t, at, value)
    #define kvmexit_store32(at, value) kvmexit_store(uint32_t, at, value)
    #define kvmexit_store64(at, value) kvmexit_store(uint64_t, at, value)
    """
    void kvmexit_count(uint64_t *)
    uint64_t kvmexit_counted(const uint64_t *)
    uint8_t kvmexit_load8(const void *)
    uint16_t kvmexit_load16(const void *)
    uint32_t kvmexit_load32(const void *)
    uint64_t kvmexit_load64(const void *)
    void kvmexit_store8(void *, uint8_t)
    void kvmexit_store16(void *, uint16_t)
    void kvmexit_store32(void *, uint32_t)
    void kvmexit_store64(void *, uint64_t)


# ---- somebody's function ----

_ACCEPTED = (
    'a PyCapsule named "int (struct kvmexit_exit *, void *)", or a ctypes or cffi function pointer or numba cfunc of '
    "that signature")


cdef object _address(function):
    """Of a foreign function, None or 0 where it is NULL; TypeError where it is none, or has another signature."""
    cdef const char *named = NULL
    if PyCapsule_CheckExact(function):
        if not PyCapsule_IsValid(function, KVMEXIT_HANDLER):
            named = PyCapsule_GetName(function)
            name = (<bytes>named).decode(errors="replace") if named != NULL else None
            raise TypeError(f"a capsule named {name!r}: a handler is {_ACCEPTED}")
        return <uintptr_t>PyCapsule_GetPointer(function, KVMEXIT_HANDLER)
    kind = foreign(function)
    if kind == "numba":
        function, kind = function.ctypes, "ctypes"
    elif kind == "cffi":
        return _of_cffi(function)
    if kind == "ctypes":
        return _of_ctypes(function)
    raise TypeError(f"{function!r} is no function of native code: that is {_ACCEPTED}")


def foreign(function):
    """-> "capsule", "ctypes", "cffi" or "numba", by the object's type alone: none of them is imported for it. None: no
    foreign function."""
    if PyCapsule_CheckExact(function):
        return "capsule"
    if _named(function, {"_ctypes.CFuncPtr", "_ctypes.PyCFuncPtr"}):
        return "ctypes"
    if _named(function, {"_cffi_backend._CDataBase", "_cffi_backend.CData"}):
        return "cffi"
    if _named(function, {"numba.core.ccallback.CFunc"}):
        return "numba"
    return None


def _named(thing, names):
    """Whether a thing's class, or a base of it, has one of these names."""
    return any([f"{cls.__module__}.{cls.__qualname__}" in names for cls in type(thing).__mro__])


def _of_ctypes(function):
    import ctypes

    keeps = function._objects or {}
    if any([type(thing).__name__ == "CThunkObject" for thing in keeps.values()]):
        raise TypeError(f"{function!r} is a ctypes callback around a Python function, which needs the GIL: pass the "
                        "function itself, it is called as (vcpu, exit)")
    if function._flags_ & 4:  # FUNCFLAG_PYTHONAPI
        raise TypeError(f"{function!r} is a function of ctypes.PyDLL, which needs the GIL")
    arguments = function.argtypes
    if (function.restype is not ctypes.c_int or arguments is None or len(arguments) != 2
            or not all([argument is ctypes.c_void_p or issubclass(argument, ctypes._Pointer) for argument in arguments])):
        raise TypeError(f"{function!r} has argtypes {arguments!r} and restype {function.restype!r}: a handler is "
                        f"{_ACCEPTED} (argtypes [c_void_p, c_void_p], restype c_int)")
    return ctypes.cast(function, ctypes.c_void_p).value


def _of_cffi(function):
    import _cffi_backend

    kind = _cffi_backend.typeof(function)
    if (kind.kind != "function" or kind.ellipsis or kind.result.cname not in ("int", "int32_t") or len(kind.args) != 2
            or not all([argument.kind == "pointer" for argument in kind.args])):
        raise TypeError(f"{function!r}: a handler is {_ACCEPTED}")
    if " calling " in repr(function):
        raise TypeError(f"{function!r} is a cffi callback around a Python function, which needs the GIL: pass the function "
                        "itself, it is called as (vcpu, exit)")
    return int(_cffi_backend.cast(_cffi_backend.new_primitive_type("uintptr_t"), function))


@cython.final
@cython.no_gc_clear  # which would forget the buffer without releasing it
cdef class Function(Native):
    """A native function as a handler: include/kvmexit/kvmexit.h (kvmexit.get_include()) says what it is given and returns.

    function: a PyCapsule whose name is the signature, "int (struct kvmexit_exit *, void *)", and whose context is passed as
    the second argument; a ctypes or cffi function pointer; a numba cfunc. It is kept alive.
    opaque: the second argument: an address (int), or an object with a writable buffer, which is kept alive and exported for
    as long; None: the capsule's context, else NULL.
    owner: an object that is kept alive, too: whose memory an address is.

    Raises TypeError for other objects and other signatures, and where it shows that it is a callback around a Python
    function; ValueError for NULL.
    """

    def __cinit__(self, function, opaque=None, *, owner=None):
        address = _address(function)
        if not address:
            raise ValueError(f"{function!r} is NULL")
        self.call = <kvmexit_handler><uintptr_t>address
        self.function, self.owner = function, owner
        if opaque is None:
            if PyCapsule_CheckExact(function):
                self.opaque = PyCapsule_GetContext(function)
        elif isinstance(opaque, int):
            self.opaque = <void *><uintptr_t>opaque
        elif _named(opaque, {"_ctypes._Pointer"}):
            raise TypeError(f"{opaque!r} is a pointer, whose buffer is itself: give what it points to, or an address")
        else:
            PyObject_GetBuffer(opaque, &self.buffer, PyBUF_WRITABLE)
            self.exported = True
            self.opaque = self.buffer.buf

    def __dealloc__(self):
        if self.exported:
            PyBuffer_Release(&self.buffer)

    def __repr__(self):
        return f"Function({getattr(self.function, '__name__', None) or repr(self.function)})"


# ---- answering ----

cdef void fill(kvmexit_exit *exit, uint64_t value) noexcept nogil:
    """Answer each access of a read with the low bytes of a number."""
    cdef uint8_t *data = <uint8_t *>exit.data
    cdef uint64_t i
    if exit.size == 1:
        memset(data, <int>(value & 0xff), exit.count)
        return
    for i in range(exit.count):
        memcpy(data + i * exit.size, &value, exit.size)  # size is 8 at most where there is data


cdef int ignore(kvmexit_exit *exit, void *opaque) noexcept nogil:
    if exit.data == NULL:
        return KVMEXIT_PASS if exit.owes else KVMEXIT_DONE
    if not exit.is_write:
        fill(exit, (<uint64_t *>opaque)[0])
    return KVMEXIT_DONE


@cython.final
cdef class Ignore(Native):
    """Swallows writes, and answers reads with a constant: its low bytes, -1 being all ones at every size.

    value: -2**63 .. 2**64-1, else OverflowError. Exits that ask for something else (XEN, HYPERV, TDX, ...) pass. Memory
    faults it is not for: they would only come again.
    """

    def __cinit__(self, value=0):
        self.constant = <uint64_t><long long>value if value < 0 else value
        self.call, self.opaque = ignore, &self.constant

    def __repr__(self):
        return f"Ignore({self.constant:#x})"


cdef int stop(kvmexit_exit *exit, void *opaque) noexcept nogil:
    return KVMEXIT_STOP


@cython.final
cdef class Stop(Native):
    """Has run() return the exit, before handlers that are less specific, or older."""

    def __cinit__(self):
        self.call = stop

    def __repr__(self):
        return "Stop()"


cdef int count(kvmexit_exit *exit, void *opaque) noexcept nogil:
    cdef Count *c = <Count *>opaque
    kvmexit_count(&c.others if exit.data == NULL else &c.writes if exit.is_write else &c.reads)
    return KVMEXIT_PASS


@cython.final
cdef class Counter(Native):
    """Counts exits and passes them on.

    reads, writes (a string instruction is one), others (exits that are neither: faults, HLT).
    """

    def __cinit__(self):
        self.call, self.opaque = count, &self.count

    @property
    def reads(self):
        return kvmexit_counted(&self.count.reads)

    @property
    def writes(self):
        return kvmexit_counted(&self.count.writes)

    @property
    def others(self):
        return kvmexit_counted(&self.count.others)

    def __repr__(self):
        return f"Counter(reads={self.reads}, writes={self.writes}, others={self.others})"


# ---- devices ----

cdef int dup_eventfd(fd) except -1:
    """A descriptor of our own for an eventfd."""
    fd = fd if isinstance(fd, int) else fd.fileno()
    try:
        what = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        what = "closed"
    if "[eventfd]" not in what:
        raise ValueError(f"fd {fd} is no eventfd: {what}")
    return os.dup(fd)


cdef int ring(kvmexit_exit *exit, void *opaque) noexcept nogil:
    if exit.data == NULL or not exit.is_write:
        return KVMEXIT_PASS
    eventfd_write((<int *>opaque)[0], exit.count)
    return KVMEXIT_DONE


@cython.final
cdef class EventFd(Native):
    """A doorbell: each write adds one to an eventfd, whatever is written; of a string instruction each access. Reads pass.

    eventfd: a descriptor or an object with fileno(); duplicated. Make it EFD_NONBLOCK: then a full counter loses the write,
    else it blocks the vCPU, and kick() does not end that. Raises ValueError for what is no eventfd.
    """

    def __cinit__(self, eventfd):
        self.eventfd = dup_eventfd(eventfd)
        self.call, self.opaque = ring, &self.eventfd

    def __dealloc__(self):
        if self.call != NULL:
            close(self.eventfd)

    def __repr__(self):
        return "EventFd()"


cdef void load_register(const uint8_t *register, uint8_t *data, uint64_t size) noexcept nogil:
    """An aligned access of a power of two is one load, so that nobody sees half of it."""
    cdef uint64_t value = 0, i
    if <uintptr_t>register & (size - 1) == 0 and size in (2, 4, 8):
        value = (kvmexit_load16(register) if size == 2 else kvmexit_load32(register) if size == 4
                 else kvmexit_load64(register))
        memcpy(data, &value, size)
        return
    for i in range(size):
        data[i] = kvmexit_load8(register + i)


cdef void store_register(uint8_t *register, const uint8_t *data, uint64_t size) noexcept nogil:
    cdef uint64_t value = 0, i
    if <uintptr_t>register & (size - 1) == 0 and size in (2, 4, 8):
        memcpy(&value, data, size)
        if size == 2:
            kvmexit_store16(register, <uint16_t>value)
        elif size == 4:
            kvmexit_store32(register, <uint32_t>value)
        else:
            kvmexit_store64(register, value)
        return
    for i in range(size):
        kvmexit_store8(register + i, data[i])


cdef int access_registers(kvmexit_exit *exit, void *opaque) noexcept nogil:
    """What lies beyond the registers reads as ones, and takes no writes."""
    cdef Device *d = <Device *>opaque
    cdef uint64_t offset = exit.address - exit.base, inside = 0, size = exit.size, i, j
    cdef bint msr = exit.reason == KVM_EXIT_X86_RDMSR or exit.reason == KVM_EXIT_X86_WRMSR
    cdef uint8_t *data = <uint8_t *>exit.data
    cdef bint plain = True
    if data == NULL or exit.reason == KVM_EXIT_HYPERCALL:
        return KVMEXIT_PASS
    if msr:
        offset *= 8
    if offset < d.size:
        inside = min(size, d.size - offset)
    if not exit.is_write:
        for i in range(exit.count):
            for j in range(inside, size):
                data[i * size + j] = 0xff
            if inside:
                load_register(d.registers + offset, data + i * size, inside)
        return KVMEXIT_DONE
    if d.read_only != NULL:
        for j in range(inside):
            plain = plain and not d.read_only[offset + j]
    for i in range(exit.count):
        if plain and inside:
            store_register(d.registers + offset, data + i * size, inside)
        elif not plain:
            for j in range(inside):
                if not d.read_only[offset + j]:
                    kvmexit_store8(d.registers + offset + j, data[i * size + j])
    if d.doorbell >= 0:
        eventfd_write(d.doorbell, exit.count)
    return KVMEXIT_DONE


@cython.final
@cython.no_gc_clear  # which would forget the buffer without releasing it
cdef class Registers(Native):
    """A buffer as a device's registers: its first byte lies where the route begins.

    buffer: a writable buffer, exported for as long as this exists. read_only: None, or as many bytes as it has, nonzero
    where guests cannot write. eventfd: None, or one to which each write adds one, after it was stored: see EventFd.

    Reads and writes go by the bytes that the guest accesses; an MSR takes eight. An aligned access of 2, 4 or 8 bytes is one
    load or store, unless the mask splits it. Of a string instruction each access is to the same register. Bytes beyond the
    buffer read as 0xff, and take no writes. Exits other than PIO, MMIO and MSR accesses pass.

    Raises BufferError or TypeError for other buffers, ValueError for a mask of another length or what is no eventfd.
    """

    def __cinit__(self, buffer, read_only=None, eventfd=None):
        self.device.doorbell = -1
        self.opaque = &self.device
        PyObject_GetBuffer(buffer, &self.buffer, PyBUF_SIMPLE | PyBUF_WRITABLE)
        self.device.registers, self.device.size = <uint8_t *>self.buffer.buf, self.buffer.len
        if read_only is not None:
            self.mask = bytes(memoryview(read_only))
            if <uint64_t>len(self.mask) != self.device.size:
                raise ValueError(f"a read_only mask of {len(self.mask)} bytes for {self.device.size} bytes of registers")
            self.device.read_only = <const uint8_t *><const char *>self.mask
        if eventfd is not None:
            self.device.doorbell = dup_eventfd(eventfd)
        self.eventfd = eventfd
        self.call = access_registers

    def __dealloc__(self):
        if self.opaque != NULL and self.device.doorbell >= 0:  # else its __cinit__ did not begin, and this is 0
            close(self.device.doorbell)
        PyBuffer_Release(&self.buffer)

    def __repr__(self):
        return f"Registers(<{self.device.size} bytes>)"


@cython.final
cdef class Serial16550(Native):
    """A serial port, a 16550A: what the guest prints goes to a file descriptor.

        reader, writer = os.pipe()
        serial = native.Serial16550(writer)
        vm.on_pio(0x3f8, 8, serial)          # COM1; or on_mmio(gpa, 8, serial), its registers one byte apart
        serial.feed(b"root\\n")              # 5: that many were taken
        vcpu.run()
        os.read(reader, 4096)

    fd: a writable descriptor, or an object with fileno(), whose buffer is passed by; duplicated. sent, dropped: bytes that
    were written to it, or could not be. feed(data): have the guest receive. pending: bytes fed that it has not read.

    Transmitter: a byte is written when the guest writes it, a string instruction's bytes together, and the vCPU goes on when
    that is done. A non-blocking descriptor (as it is when this is made) drops what finds no room. Any drops what fails
    (EPIPE, ENOSPC); the next byte is tried again. SIGPIPE is ignored, as Python does, unless you have changed that. Where a
    descriptor blocks, the vCPU waits for who reads it; where it is wanted elsewhere (a kick, a pause, a time-out; on the
    main thread always), for a second at most, then drops. Somebody else who fills the same pipe can make that longer.

    Receiver: 16 bytes in FIFO mode, else one. 4096 more wait until there is room; feed() takes no more than that. Drivers
    empty the receiver at their beginning.

    Registers: as the data sheet has them, with loopback, scratch, divisor latch and modem lines (DCD, DSR and CTS are on).
    The transmitter is always empty. Baud rate, parity, break and trigger levels do nothing; there is no receive time-out.
    There are no interrupts yet: IIR names the one there would be, by IER (overrun, received data, transmitter empty,
    modem), for drivers that poll it; 1 is none. A wider access is one of each byte, low first, to registers one after
    another; beyond the eighth reads are 0xff, and writes ignored. Exits other than PIO and MMIO pass.

    Raises ValueError for a descriptor that cannot be written to. Source: PC16550D data sheet; Linux,
    drivers/tty/serial/8250/8250_port.c, autoconfig().
    """

    def __cinit__(self, fd):
        cdef int error
        self.serial.fd = -1
        self.opaque = &self.serial
        fd = fd if isinstance(fd, int) else fd.fileno()
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        if flags & os.O_ACCMODE == os.O_RDONLY:
            raise ValueError(f"fd {fd} cannot be written to")
        waits = not flags & os.O_NONBLOCK and not stat.S_ISREG(os.fstat(fd).st_mode)
        error = kvmexit_serial_init(&self.serial, os.dup(fd), waits)
        if error:
            raise OSError(error, os.strerror(error))
        self.call = kvmexit_serial_access

    def __dealloc__(self):
        if self.opaque != NULL and self.serial.fd >= 0:  # else its __cinit__ did not begin, and this is 0
            close(self.serial.fd)

    def feed(self, data):
        """Have the guest receive bytes; -> how many there was room for, from the first on. TypeError for other objects."""
        cdef Py_buffer buffer
        PyObject_GetBuffer(data, &buffer, PyBUF_SIMPLE)
        try:
            return kvmexit_serial_feed(&self.serial, <const uint8_t *>buffer.buf, buffer.len)
        finally:
            PyBuffer_Release(&buffer)

    @property
    def pending(self):
        return kvmexit_serial_pending(&self.serial)

    @property
    def sent(self):
        return kvmexit_serial_counted(&self.serial.sent)

    @property
    def dropped(self):
        return kvmexit_serial_counted(&self.serial.dropped)

    def __repr__(self):
        return f"Serial16550(sent={self.sent}, dropped={self.dropped}, pending={self.pending})"
