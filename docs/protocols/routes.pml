/*
 * Swapping the route table under vCPUs that read it without a lock. A table that was swapped out is freed once nobody can be
 * using it. A vCPU's stores of its state, and of its counter with it, are plain ones: they lie in a store buffer (x86; one
 * entry is enough for a load to overtake them) before the writer sees them. -DBREAK_R1 breaks R1, and so on.
 */
#define VCPUS 2
#define SWAPS 2
mtype = { NOTHING, KVM, NATIVE }; /* KVM stands for OUT too: in neither are tables looked at */

mtype state[VCPUS] = KVM;         /* as the writer sees it */
mtype buffered[VCPUS] = NOTHING;  /* the store buffer */
bit moved[VCPUS];                 /* the counter, which grows with each NATIVE, is not what the writer noted */
byte table;                       /* the pointer: tables are numbered */
bit freed[SWAPS + 1];             /* not in the code, nor is: */
bit removing;

ltl remove_terminates { [] (removing -> <> !removing) } /* no table is used after it was freed: the assertion in vcpu */

inline drain(v) /* what is in the store buffer becomes visible */
{
    atomic {
        if
        :: buffered[v] != NOTHING ->
            state[v] = buffered[v];
            moved[v] = moved[v] || buffered[v] == NATIVE;
            buffered[v] = NOTHING
        :: else
        fi }
}

inline store(v, what) { drain(v); buffered[v] = what }

active [VCPUS] proctype vcpu()
{
    byte mine;
    do /* KVM_RUN has returned */
    ::
#ifdef BREAK_R1
        mine = table;
        store(_pid, NATIVE);
#else
        store(_pid, NATIVE);    /* R1: NATIVE (and the counter) is stored before the pointer is loaded */
#ifndef BREAK_R2
        mine = table;           /* R2: loaded after each return of KVM_RUN, never carried over an entry */
#endif
#endif
#ifdef BREAK_R3
        store(_pid, KVM);
#endif
        assert(!freed[mine]);   /* native handlers, out of the table: its first use */
        assert(!freed[mine]);   /* and its last */
#ifdef BREAK_R2
        mine = table;
#endif
#ifndef BREAK_R3
        store(_pid, KVM);       /* R3: after the last use (on x86 a store does not overtake earlier loads) */
#endif
        if                      /* KVM_RUN */
        :: skip
        :: skip ->
end_spin:   false               /* for ever */
        fi
    od
}

active [VCPUS] proctype store_buffer() /* of vcpu _pid - VCPUS */
{
end:
    do
    :: buffered[_pid - VCPUS] != NOTHING -> drain(_pid - VCPUS)
    od
}

inline barrier() /* membarrier(): each vCPU's thread executes a barrier, one after the other */
{
#ifdef BREAK_R5
    skip
#else
    for (v in state) { drain(v) } /* R5: without it NATIVE may lie in a store buffer while the old table is in use */
#endif
}

active proctype writer()
{
    byte old, v;
    do
    :: old < SWAPS ->
        removing = 1;
#ifdef BREAK_R4
        barrier();
        table = old + 1;
#else
        table = old + 1;          /* R4: the swap before the barrier: who loads after it has the new table */
#ifdef BREAK_R6
        for (v in state) { moved[v] = 0 };
#endif
        barrier();
#endif
#ifndef BREAK_R6
        for (v in state) { moved[v] = 0 }; /* R6: the counter is noted after the barrier, which may make it grow */
#endif
        for (v in state) {
            do
#ifndef BREAK_R8
            :: moved[v] -> break  /* R8: or else a vCPU that is NATIVE at each look is waited for for ever */
#endif
#ifdef BREAK_R7
            :: true -> break
#endif
            :: state[v] != NATIVE -> break /* R7: it is not NATIVE, or not in that NATIVE any more */
            :: else
            od
        };
        freed[old] = 1;
        removing = 0;
        old++
    :: else -> break
    od
}
