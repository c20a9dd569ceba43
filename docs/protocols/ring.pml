/*
 * Entries that vCPUs put into lanes of a Ring, and the eventfd that says when to look (_ring.h). Producers write what they
 * have to and end; a consumer sleeps until the eventfd is readable, and drains; a second one drains once, as any thread may.
 * Producers' stores of `tail` go through a store buffer of one entry (x86), which sequentially consistent stores empty. With
 * ROOM entries a lane is full, and its producer waits for `head` to change (futex). -DBREAK_W1 breaks W1, and so on.
 */
#define PRODUCERS 2
#define WRITES 2
#define ROOM 1
mtype = { ARMED, RINGING, RUNG };

mtype bell = ARMED;
byte readable;               /* the eventfd's counter */
byte tail[PRODUCERS];        /* as others see it */
bit buffered[PRODUCERS];     /* one more, in the store buffer */
byte head[PRODUCERS];
bit waits[PRODUCERS];
bit asleep[PRODUCERS];       /* in the futex */
bit lock;
byte taken;                  /* not in the code */

inline drain_buffer(p) { atomic { tail[p] = tail[p] + buffered[p]; buffered[p] = 0 } }

inline call() /* after an entry was stored */
{
    if
    :: bell == ARMED ->
#ifdef BREAK_W2
        bell = RINGING; rings = 1
#else
        atomic { /* W2: one of those who saw it ARMED */
            if
            :: bell == ARMED -> bell = RINGING; rings = 1
            :: else -> rings = 0
            fi }
#endif
        ;
        if
        :: rings ->
#ifdef BREAK_W3
            bell = RUNG; readable++
#else
            readable++;
            bell = RUNG     /* W3: after the write to the eventfd */
#endif
        :: else
        fi
    :: else
    fi
}

active [PRODUCERS] proctype producer()
{
    byte written, saw;
    bit rings;
    do
    :: written == WRITES -> break
    :: else ->
        do /* room */
        :: atomic { tail[_pid] + buffered[_pid] - head[_pid] < ROOM -> break }
        :: else ->
#ifndef BREAK_W7
            waits[_pid] = 1;    /* W7: before the kernel compares `head` */
#endif
            saw = head[_pid];
            if
            :: tail[_pid] + buffered[_pid] - saw < ROOM
            :: else ->
#ifdef BREAK_W8
                asleep[_pid] = 1;
#else
                atomic {        /* W8: the kernel compares `head` with what was looked at */
                    if
                    :: head[_pid] == saw -> asleep[_pid] = 1
                    :: else
                    fi };
#endif
#ifdef BREAK_W7
                waits[_pid] = 1;
#endif
                !asleep[_pid]   /* a time-out, which the code has, would hide what is lost here */
            fi;
            waits[_pid] = 0
        od;
        written++;
        buffered[_pid] = 1;
#ifndef BREAK_W1
        drain_buffer(_pid);     /* W1: `tail` is stored before `bell` is looked at */
#endif
        call()
    od
}

active [PRODUCERS] proctype store_buffer() /* of producer _pid - PRODUCERS */
{
end:
    do
    :: buffered[_pid - PRODUCERS] -> drain_buffer(_pid - PRODUCERS)
    od
}

inline drain() /* got: how many */
{
    atomic { !lock -> lock = 1 };
    got = 0;
    for (p in head) {
#ifdef BREAK_W9
        woken = waits[p];
        atomic { k = tail[p] - head[p]; head[p] = head[p] + k };
#else
        atomic { k = tail[p] - head[p]; head[p] = head[p] + k }; /* W9: before `waits` is looked at */
        woken = waits[p];
#endif
        atomic {
            if
            :: k && woken -> asleep[p] = 0
            :: else
            fi;
            got = got + k;
            k = 0;
            woken = 0 }
    };
    atomic {
        p = 0;
        taken = taken + got;
        lock = 0 }
}

inline rest() /* found: whether there is something after all */
{
    atomic { !lock -> lock = 1 };
    found = 0;
    if
    :: bell == RUNG ->
#ifdef BREAK_W4
        bell = ARMED;
        readable = 0;
#else
        readable = 0;           /* W4: the eventfd is read before it is armed */
        bell = ARMED;
#endif
#ifndef BREAK_W5
        for (p in head) { found = found || tail[p] != head[p] }; /* W5: then the lanes are looked at again */
#ifndef BREAK_W6
        if
        :: found -> call()      /* W6: the eventfd becomes readable again */
        :: else
        fi
#endif
#endif
    :: else
    fi;
    atomic {
        assert(bell != ARMED || !readable); /* or a loop that polls it would spin: an empty drain does not read it */
        p = 0;
        found = 0;
        rings = 0;
        lock = 0 }
}

active proctype sleeper() /* drains when called */
{
    byte got, p, k;
    bit found, rings, woken;
    do
    :: taken == PRODUCERS * WRITES -> break
    :: readable ->
        drain();
        if
        :: got == 0 -> rest() /* and sleeps, also if something was found: it will be called */
        :: else
        fi
    od
}

active proctype passer_by() /* drains once, whenever that is */
{
    byte got, p, k;
    bit found, rings, woken;
    if
    :: drain();
        if
        :: got == 0 -> rest()
        :: else
        fi
    :: skip
    fi
}
