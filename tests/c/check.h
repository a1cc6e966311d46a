/* SPDX-License-Identifier: MIT
 *
 * Checks of C tests, in every build. tests/t0_format/test_c.py builds and runs every test_*.c and
 * stress_*.c that it finds here (pytest tests/t0_format/test_c.py -k NAME). A check that fails prints where it stands, its expression and its
 * values. Inside RUN(case) it also names the case, ends it, and the program goes on with the next one;
 * anywhere else, and on other threads, it ends the program. CHECK_REPORT() is the exit code.
 */
#ifndef CHECK_H
#define CHECK_H

#include <pthread.h>
#include <setjmp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

static struct {
    const char *name; /* of the case that runs; NULL: none */
    pthread_t thread; /* that runs it */
    jmp_buf end;
    int failures;
} check_case;

static inline void check_fail(const char *file, int line, const char *expression, const char *values)
{
    bool in_case = check_case.name != NULL && pthread_equal(pthread_self(), check_case.thread);
    fprintf(stderr, "%s:%d: failed: %s%s%s%s\n", file, line, expression, values,
            check_case.name != NULL ? ", in " : "", check_case.name != NULL ? check_case.name : "");
    if (!in_case)
        exit(1);
    longjmp(check_case.end, 1);
}

static inline void check_run(void (*function)(void), const char *name)
{
    check_case.name = name;
    check_case.thread = pthread_self();
    if (setjmp(check_case.end) == 0)
        function();
    else
        check_case.failures++;
    check_case.name = NULL;
}

#define RUN(function) check_run(function, #function)
#define CHECK_REPORT() (check_case.failures > 0)

#define CHECK(condition)                                                                    \
    do {                                                                                    \
        if (!(condition))                                                                   \
            check_fail(__FILE__, __LINE__, #condition, "");                                 \
    } while (0)

/* Compares two numbers as C does, and prints both. */
#define CHECK_COMPARE(a, op, b)                                                             \
    do {                                                                                    \
        const __typeof__((a) + (b)) check_a = (__typeof__((a) + (b)))(a);                   \
        const __typeof__((a) + (b)) check_b = (__typeof__((a) + (b)))(b);                   \
        if (!(check_a op check_b)) {                                                        \
            char check_text[100];                                                           \
            if (_Generic(check_a, float : true, double : true, default : false))            \
                snprintf(check_text, sizeof check_text, " (%.10g, %.10g)",                  \
                         (double)check_a, (double)check_b);                                 \
            else if (_Generic(check_a, unsigned long : true, unsigned long long : true,     \
                              default : false))                                             \
                snprintf(check_text, sizeof check_text, " (%llu, %llu)",                    \
                         (unsigned long long)check_a, (unsigned long long)check_b);         \
            else                                                                            \
                snprintf(check_text, sizeof check_text, " (%lld, %lld)", (long long)check_a, \
                         (long long)check_b);                                               \
            check_fail(__FILE__, __LINE__, #a " " #op " " #b, check_text);                  \
        }                                                                                   \
    } while (0)

#define CHECK_EQ(a, b) CHECK_COMPARE(a, ==, b)
#define CHECK_NE(a, b) CHECK_COMPARE(a, !=, b)
#define CHECK_LE(a, b) CHECK_COMPARE(a, <=, b)
#define CHECK_GE(a, b) CHECK_COMPARE(a, >=, b)
#define CHECK_LT(a, b) CHECK_COMPARE(a, <, b)
#define CHECK_GT(a, b) CHECK_COMPARE(a, >, b)

#endif
