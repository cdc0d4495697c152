# The promise of the Stable ABI: a library that needs no symbol of c10:: or at:: loads into every
# torch from the target version on.
execute_process(COMMAND ${NM} --undefined-only --dynamic --demangle ${LIBRARY}
                OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[^\n]* (c10|at|caffe2|torch::jit|torch::autograd)::[^\n]*" unstable "${symbols}")
if(unstable)
  list(JOIN unstable "\n" lines)
  message(FATAL_ERROR "${LIBRARY} needs symbols that are not stable:\n${lines}")
endif()
