/* Nearly always in the middle of making a process or a thread: whoever comes then must not miss what is being made. */
#define REST 0
#include "../spawning.c"
