// What the CUDA runtime within the library calls: glibc 2.34 gave these functions a new version, when it moved them
// from libpthread, libdl and librt into libc.
#include "core/older_glibc.h"

FROM_FIRST_GLIBC(dlclose);
FROM_FIRST_GLIBC(dlerror);
FROM_FIRST_GLIBC(dlopen);
FROM_FIRST_GLIBC(dlsym);
FROM_FIRST_GLIBC(dlvsym);
FROM_FIRST_GLIBC(pthread_condattr_setpshared);
FROM_FIRST_GLIBC(pthread_create);
FROM_FIRST_GLIBC(pthread_detach);
FROM_FIRST_GLIBC(pthread_getspecific);
FROM_FIRST_GLIBC(pthread_join);
FROM_FIRST_GLIBC(pthread_key_create);
FROM_FIRST_GLIBC(pthread_key_delete);
FROM_FIRST_GLIBC(pthread_kill);
FROM_FIRST_GLIBC(pthread_mutex_trylock);
FROM_FIRST_GLIBC(pthread_mutexattr_destroy);
FROM_FIRST_GLIBC(pthread_mutexattr_init);
FROM_FIRST_GLIBC(pthread_mutexattr_setpshared);
FROM_FIRST_GLIBC(pthread_mutexattr_settype);
FROM_FIRST_GLIBC(pthread_once);
FROM_FIRST_GLIBC(pthread_rwlock_destroy);
FROM_FIRST_GLIBC(pthread_rwlock_init);
FROM_FIRST_GLIBC(pthread_rwlock_rdlock);
FROM_FIRST_GLIBC(pthread_rwlock_timedrdlock);
FROM_FIRST_GLIBC(pthread_rwlock_timedwrlock);
FROM_FIRST_GLIBC(pthread_rwlock_tryrdlock);
FROM_FIRST_GLIBC(pthread_rwlock_trywrlock);
FROM_FIRST_GLIBC(pthread_rwlock_unlock);
FROM_FIRST_GLIBC(pthread_rwlock_wrlock);
FROM_FIRST_GLIBC(pthread_rwlockattr_destroy);
FROM_FIRST_GLIBC(pthread_rwlockattr_init);
FROM_FIRST_GLIBC(pthread_rwlockattr_setpshared);
FROM_FIRST_GLIBC(pthread_setspecific);
FROM_FIRST_GLIBC(pthread_spin_destroy);
FROM_FIRST_GLIBC(pthread_spin_init);
FROM_FIRST_GLIBC(pthread_spin_lock);
FROM_FIRST_GLIBC(pthread_spin_trylock);
FROM_FIRST_GLIBC(pthread_spin_unlock);
FROM_FIRST_GLIBC(sem_destroy);
FROM_FIRST_GLIBC(sem_init);
FROM_FIRST_GLIBC(sem_post);
FROM_FIRST_GLIBC(sem_timedwait);
FROM_FIRST_GLIBC(sem_trywait);
FROM_FIRST_GLIBC(sem_wait);
FROM_FIRST_GLIBC(shm_open);
FROM_FIRST_GLIBC(shm_unlink);
#if defined(__x86_64__)
FROM_GLIBC("GLIBC_2.3.4", dlmopen);
#else
FROM_FIRST_GLIBC(dlmopen);
#endif
