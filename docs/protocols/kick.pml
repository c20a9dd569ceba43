/*
 * kick() against run() and complete(): src/kvmexit/_control.h, burst() and interrupted() in src/kvmexit/_loop.pyx.
 * Every statement is one step, in the order written (sequential consistency, which seq_cst gives); names are the code's.
 * A label K1, K2, ... is an ordering that matters. -DBREAK_K1 breaks it, and `check` wants spin to refute that.
 */
bit request, immediate_exit, tid; /* of struct kvmexit_vcpu; one bit each will do */
bit current;  /* the runner's thread-local */
bit signal;   /* pending at the runner's thread */
bit in_kvm;   /* the runner is inside KVM_RUN: no signal handler runs until it is back */
bit owed;     /* not in the code: a kick since the last return that said "kick" */

ltl no_kick_lost { [] (owed -> <> !owed) } /* none is stale: the assertion in runner */

/* kvmexit_kick(). Kickers stop some time, or the next kick would make up for one that was lost. */
active [2] proctype kicker()
{
    bit t;
    do
    ::
#ifdef BREAK_K2 /* the stores are still in the store buffer when tid is loaded: why all of these are seq_cst */
        t = tid;
#endif
#ifdef BREAK_K1
        immediate_exit = 1;
        atomic { request = 1; owed = 1 };
#else
        atomic { request = 1; owed = 1 }; /* K1: request first, then immediate_exit */
#ifndef BREAK_K3
        immediate_exit = 1;               /* K3: by the kicker itself: the handler's store may come too late */
#endif
#endif
#ifndef BREAK_K2
        t = tid;                          /* K2: after both stores */
#endif
        if
        :: t -> signal = 1                /* tgkill */
        :: else
        fi
    :: break
    od
}

/* kvmexit_on_signal(): between any two steps of the runner outside KVM. Sanitizers put it off, past the entry too (`skip`):
 * K1 and K3 are for that, without it the other orderings are enough. */
active proctype handler()
{
end:
    do
    :: atomic { signal && !in_kvm ->
        signal = 0;
        if
        :: current -> immediate_exit = 1
        :: skip
        fi }
    od
}

active proctype runner()
{
    bit drain;    /* burst(c, drain): complete(), or registers are written back */
    bit half;     /* the access that exited has a second half */
    bit seen;
    do
    ::  current = 1;         /* kvmexit_begin() */
#ifndef BREAK_K4
        tid = 1;             /* K4: before the first entry samples immediate_exit (and kvmexit_renew() loads request) */
#endif
burst:
        if
        :: !drain -> drain = 1; immediate_exit = 1 /* somebody who drains for ever is no run() that a kick could end */
        :: drain = 0;
#ifndef BREAK_K5
           if /* K5: kvmexit_renew(): a drain may have spent the immediate_exit of a kick */
           :: request -> immediate_exit = 1
           :: else
           fi
#endif
        fi;
enter:
        in_kvm = 1;
        if
        :: half -> half = 0; goto exit   /* KVM completes what is pending before it looks at immediate_exit */
        :: immediate_exit -> goto eintr
        :: !immediate_exit               /* sampled, once: what is stored from here on comes too late for this entry */
        fi;
#ifdef BREAK_K4
        tid = 1;
#endif
        if
        :: skip ->
end_spin:  signal -> goto eintr         /* a guest that spins: only a signal gets it out */
        :: half = 1; goto exit
        :: half = 0; goto exit
        fi;
exit:
        in_kvm = 0;
        if
        :: goto burst                    /* a handler took it */
        :: goto finish                   /* run() returns it */
        fi;
eintr:
        in_kvm = 0;
#ifdef BREAK_K6
        seen = request;
        immediate_exit = 0;
#else
        immediate_exit = 0;  /* K6: kvmexit_acknowledge(): the exchange first, */
        seen = request;      /* then the load */
#endif
        if
        :: drain ->
#ifdef BREAK_K7
            request = 0;
#endif
            if               /* K7: DRAINED: the request stays open */
            :: goto burst
            :: goto finish
            fi
#ifdef BREAK_K8
        :: !drain ->
#else
        :: !drain && seen -> /* K8: only request makes run() say "kick" */
#endif
            atomic {
                assert(owed);
#ifndef BREAK_K9
                request = 0; /* K9: kvmexit_consume_kick(): cleared by the return that says so */
#endif
                owed = 0;
            };
            goto finish
#ifndef BREAK_K8
        :: !drain && !seen -> goto enter /* nobody asked */
#endif
        fi;
finish:
        tid = 0;             /* kvmexit_end() */
        current = 0
    od
}
