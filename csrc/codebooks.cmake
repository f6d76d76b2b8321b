# The target `codebooks`: the header codebooks.h in CODEBOOKS_FOLDER. The codebooks have one source, bnbops/codebooks.py.
set(CODEBOOKS_PY ${CMAKE_CURRENT_LIST_DIR}/../bnbops/codebooks.py)
set(CODEBOOKS_FOLDER ${CMAKE_CURRENT_BINARY_DIR}/generated)
file(MAKE_DIRECTORY ${CODEBOOKS_FOLDER})
add_custom_command(
  OUTPUT ${CODEBOOKS_FOLDER}/codebooks.h
  COMMAND ${Python_EXECUTABLE} ${CODEBOOKS_PY} --header > ${CODEBOOKS_FOLDER}/codebooks.h
  DEPENDS ${CODEBOOKS_PY} VERBATIM)
add_custom_target(codebooks DEPENDS ${CODEBOOKS_FOLDER}/codebooks.h)
