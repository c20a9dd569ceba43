/*
 * pause(), resume() and parking. `atomic` is one section under the lock (the GIL); between two anybody may get it.
 * That a bit set in request ends KVM_RUN, before the guest and in it, is kick.pml's result: it holds for PAUSE as for KICK.
 * Threads 0 and 1 run a vCPU each, and its handlers may pause. One of vCPU 0 may run vCPU 2, inside its own run(). Thread 2
 * runs none. vCPU 1 may be run by the C API instead, which has no lock: each of its looks and stores is a step of its own, and
 * its handlers do not pause. pause()'s own signal to a vCPU that is parked already would only wake it for nothing. -DBREAK_P1 breaks P1, and so on.
 */
#define KICK 1
#define PAUSE 2

byte request[3];
bit made[3];        /* create_vcpu() is through (of 2: before all this) */
bit owner[3];       /* a run() is in progress: page.owner != 0 */
bit parked[3];
bit asleep[3];      /* in futex_wait(request); woken by FUTEX_WAKE and by signals, not by a mere store */
byte pauses;        /* pause() calls not taken back yet, those that still wait included */
byte granted[3];    /* by thread: the pauses it holds */
byte waiting[3];    /* by thread: 1 in pause(), 2 in pause() and Ctrl-C came */
bit napping[3];     /* by thread: in the condition variable's wait */
bit left[2] = 1;    /* not in the code: its handlers will still pause, once */
bit busy[3];        /* not in the code: inside KVM_RUN, or in a handler (one that waits in pause() excepted) */

#define NESTED(v) (v == 2)
#define HANDLER(t) (t < 2)
#define OUT(v) (!owner[v] || parked[v])
#define ALONE(t) (granted[0] + granted[1] + granted[2] == granted[t])
#ifdef BREAK_P1
#define GRANTABLE(t) ((t == 0 || OUT(0) && OUT(2)) && (t == 1 || OUT(1)))
#else /* P1: a handler waits for the other holders too: theirs was granted because its own vCPU was parked */
#define GRANTABLE(t) ((t == 0 || OUT(0) && OUT(2)) && (t == 1 || OUT(1)) && (!HANDLER(t) || ALONE(t)))
#endif
#ifdef BREAK_P4
#define MAY_LEAVE(t) (waiting[t] == 2 || GRANTABLE(t))
#else /* P4: nor may a handler leave on Ctrl-C while others hold a pause: first it takes its own back, then it waits for them */
#define MAY_LEAVE(t) (waiting[t] == 1 -> GRANTABLE(t) : !HANDLER(t) || ALONE(t))
#endif

#define QUIET assert(!(granted[0] && busy[1]) && !((granted[1] || granted[2]) && (busy[0] || busy[2])) && !(granted[2] && busy[1]))

inline notify() { atomic { napping[0] = 0; napping[1] = 0; napping[2] = 0 } }
inline wake() { atomic { asleep[0] = 0; asleep[1] = 0; asleep[2] = 0 } }

inline take_back()
{
#ifdef BREAK_P8
    wake();
#endif
    atomic {
        pauses--;
        if
#ifdef BREAK_P7
        :: true ->
#else
        :: pauses == 0 -> /* P7: by the last one only */
#endif
            request[0] = request[0] & KICK; request[1] = request[1] & KICK; request[2] = request[2] & KICK
        :: else
        fi;
#ifndef BREAK_P8
        wake();  /* P8: after the bit is clear */
#endif
#ifndef BREAK_P9
        notify() /* P9: a pause less may be what a handler waits for (P1, P4) */
#endif
    }
}

inline pause(t)
{
    atomic {
        pauses++;
        waiting[t] = 1;
        request[0] = request[0] | (made[0] -> PAUSE : 0);
        request[1] = request[1] | (made[1] -> PAUSE : 0);
        request[2] = request[2] | PAUSE;
        if
#ifndef BREAK_P2
        :: HANDLER(t) -> parked[t] = 1; busy[t] = 0 /* P2: as good as parked, or two handlers wait for each other */
#endif
        :: else
        fi
    };
    do
    :: atomic { MAY_LEAVE(t) ->
        if :: waiting[t] == 1 -> granted[t]++ :: else fi;
        if
        :: HANDLER(t) ->
            busy[t] = 1;
#ifndef BREAK_P3
            parked[t] = 0 /* P3: in the section that grants */
#endif
        :: else
        fi;
        waiting[t] = 0;
        QUIET;
        break }
    :: atomic { !MAY_LEAVE(t) -> napping[t] = 1 };
        if
        :: skip -> !napping[t]
        :: t == 0 && waiting[t] == 1 -> atomic { waiting[t] = 2; napping[t] = 0 }; take_back() /* Ctrl-C */
        fi
    od
}

inline resume(t) { granted[t]--; take_back() }

inline set_parked(v, value)
{
    parked[v] = value;
#ifndef BREAK_P17
    if :: NESTED(v) -> parked[0] = value; busy[0] = !value; QUIET :: else fi /* P17: and the run() around it: all or none */
#endif
}

inline park(v)
{
    do
    :: atomic {
        seen = request[v]; /* P10: looked at under the lock, each time round */
        if
#ifdef BREAK_P18
        :: seen & KICK ->
#else   /* P18: a kick (time-out, exception) ends parking, but not in a nested run(): it would return into a handler */
        :: (seen & KICK) && !(NESTED(v) && (seen & PAUSE)) ->
#endif
            request[v] = seen & PAUSE;
            kicked = 1;
#ifndef BREAK_P11
            set_parked(v, 0); /* P11: also on this way out */
#endif
            seen = 0;
            break
        :: seen == 0 -> set_parked(v, 0); break
        :: else ->
            set_parked(v, 1);
#ifndef BREAK_P12
            notify()       /* P12 */
#endif
        fi };
#ifdef BREAK_P13
        asleep[v] = 1;
#else
        atomic { if :: request[v] == seen -> asleep[v] = 1 :: else fi }; /* P13: only if it is still what was looked at (futex) */
#endif
        !asleep[v];
#ifdef BREAK_P10
        set_parked(v, 0);
        break
#endif
    od
}

inline stand_still(v) /* park() of a run without the lock, in nobody's handler */
{
    do
    :: seen = request[v]; /* P10 */
        if
        :: seen & KICK ->
            request[v] = request[v] & PAUSE;
            kicked = 1;
#ifndef BREAK_P11
            parked[v] = 0;
#endif
            seen = 0;
            break
        :: seen == PAUSE ->
            if
            :: !parked[v] -> parked[v] = 1;
#ifndef BREAK_P12
                notify()
#endif
            :: parked[v]
            fi;
#ifdef BREAK_P13
            asleep[v] = 1;
#else
            atomic { if :: request[v] == seen -> asleep[v] = 1 :: else fi };
#endif
            !asleep[v];
#ifdef BREAK_P10
            parked[v] = 0;
            break
#endif
        :: seen == 0 ->
            if
            :: !parked[v] -> break
            :: parked[v] -> parked[v] = 0; /* P19: and then request is looked at again */
#ifdef BREAK_P19
                break
#endif
            fi
        fi
    od
}

inline begin(v)
{
#ifdef BREAK_P5
    seen = request[v];
    owner[v] = 1;
#else
    owner[v] = 1;      /* P5: owner first, */
    seen = request[v]; /* then request */
#endif
    if
#ifndef BREAK_P6
    /* P6: before the first entry: it would complete an access, even with immediate_exit */
    :: (seen & PAUSE) && !native -> park(v)
    :: (seen & PAUSE) && native -> stand_still(v)
#endif
    :: else
    fi
}

inline burst(v)
{
    atomic { busy[v] = 1; QUIET };
    if
    :: atomic { request[v] == 0 -> exited = 1 }
    :: atomic { request[v] != 0 -> busy[v] = 0 }; /* EINTR */
        seen = request[v];
        if
        :: atomic { seen & KICK -> request[v] = request[v] & PAUSE; kicked = 1; seen = 0 }
        :: seen == PAUSE && !native -> park(v)
        :: seen == PAUSE && native -> stand_still(v)
        :: seen == 0
        fi
    fi
}

inline finish(v)
{
    if
    :: !native -> atomic {
        busy[v] = 0;
        owner[v] = 0;
#ifndef BREAK_P15
        notify() /* P15 */
#endif
    }
    :: native ->
        atomic { busy[v] = 0; owner[v] = 0 };
#ifndef BREAK_P15
        if :: request[v] & PAUSE -> notify() :: else fi
#endif
    fi
}

#define me _pid
active [2] proctype vcpu()
{
    byte seen;
    bit kicked, exited, native;
    if :: native = 0 :: me == 1 -> native = 1; left[1] = 0 fi;
#ifdef BREAK_P14
    made[me] = 1;
#else
    atomic { made[me] = 1; request[me] = (pauses -> PAUSE : 0) }; /* P14: a vCPU that is made while paused is paused */
#endif
    do
    :: break
    :: begin(me); /* run() */
        do
        :: kicked -> break
        :: !kicked ->
            burst(me);
            if /* a handler */
            :: atomic { exited && left[me] -> left[me] = 0; exited = 0 };
                pause(me);
                if
                :: granted[me] -> atomic { pauses++; granted[me]++ }; resume(me); resume(me) /* a holder's pause() only counts */
                :: else
                fi
            :: atomic { exited && me == 0 && left[0] -> left[0] = 0 };
                begin(2);
                do
                :: kicked -> break
                :: !kicked -> burst(2); if :: exited -> break :: else fi
                od;
                finish(2);
                atomic { kicked = 0; exited = 0 }
            :: atomic { exited -> exited = 0 }        /* taken, and nothing else */
            :: atomic { exited -> exited = 0; break } /* run() returns it */
            :: !exited
            fi;
            busy[me] = 0
        od;
        atomic { finish(me); kicked = 0 }
    od
}

active proctype plain()
{
    pause(2);
    !(asleep[1] && request[1] & KICK); /* a holder may wait for the run() that was kicked */
    resume(2)
}

active proctype kicker()
{
    byte v;
    select(v : 1 .. 2);
    request[v] = request[v] | KICK;
#ifndef BREAK_P16
    asleep[v] = 0 /* P16: tid stays published while it is parked: the signal ends futex_wait */
#endif
}

ltl pause_terminates { []((waiting[0] -> <>!waiting[0]) && (waiting[1] -> <>!waiting[1]) && (waiting[2] -> <>!waiting[2])) }
ltl nobody_stays_parked { []((parked[0] -> <>!parked[0]) && (parked[1] -> <>!parked[1])) }
#define KICKED_RUN(v) ((request[v] & KICK) && owner[v])
ltl no_kick_lost { []((KICKED_RUN(1) -> <>!KICKED_RUN(1)) && (KICKED_RUN(2) -> <>!KICKED_RUN(2))) }
